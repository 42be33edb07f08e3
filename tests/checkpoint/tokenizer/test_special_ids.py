"""Token ids in configs."""

import pytest

from t5g2convert.checkpoint.tokenizer.special_ids import config_ids, generation_ids


def test_all_sections_of_a_config_are_read() -> None:
    config = {
        "pad_token_id": 0, "eos_token_id": [1, 106], "bos_token_id": None, "image_token_index": 9, "vocab_size": 99,
        "text_config": {"pad_token_id": 3}, "vision_config": {"pad_token_id": 4},
        "encoder": {"boi_token_index": 7, "text_config": {"eos_token_id": 5}}, "decoder": {"bos_token_id": -1},
    }  # fmt: skip
    words = [
        ("pad_token_id", 0), ("eos_token_id", 1), ("eos_token_id", 106), ("text_config.pad_token_id", 3),
        ("encoder.text_config.eos_token_id", 5),
    ]  # fmt: skip
    assert sorted(config_ids(config, images=False)) == sorted(words)
    images = [("image_token_index", 9), ("encoder.boi_token_index", 7)]
    assert sorted(config_ids(config, images=True)) == sorted([*words, *images])


@pytest.mark.parametrize("value", [None, -1, True, "1", 1.0, {}, [None, -2, [True]]])
def test_values_that_name_no_token_are_left_out(value: object) -> None:
    assert list(config_ids({"pad_token_id": value}, images=True)) == []
    assert list(generation_ids({"pad_token_id": value, "bad_words_ids": value})) == []


def test_all_settings_of_generation_are_read() -> None:
    generation = {
        "eos_token_id": [1, 106], "decoder_start_token_id": 2, "suppress_tokens": [-1, 5], "num_beams": 4,
        "forced_decoder_ids": [[1, 9], [2, None]], "sequence_bias": [[[10, 11], -2], [[12], 3.0]], "top_k": 64,
        "force_words_ids": [[[13]]], "begin_suppress_tokens": [14], "bad_words_ids": [[6, 7], [8]],
    }  # fmt: skip
    found = sorted(number for _, number in generation_ids(generation))
    assert found == [1, 2, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 106]
