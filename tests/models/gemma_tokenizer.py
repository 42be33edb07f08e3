"""A tokenizer built like Gemma 3's, with its special tokens at their ids, and the files next to it.

The vocabulary is as large as the published one and holds words made up; like there, every word of the vocabulary that
looks like a tag is an added token too, and the image token is one more, after the table.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

VOCABULARY: Final = 262_144

TAGS: Final = {
    0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 4: "<mask>", 5: "[multimodal]", 6: "<unused0>", 104: "<unused98>",
    105: "<start_of_turn>", 106: "<end_of_turn>", 255_999: "<start_of_image>", 256_000: "<end_of_image>",
    256_001: "<unused99>", 256_002: "<unused100>", 262_143: "<unused6241>",
}  # fmt: skip

SPECIAL: Final = {0, 1, 2, 3, 105, 106, 255_999, 256_000}

LOOKALIKES: Final = (
    'a"<unused99>', '"<unused99>"', '\\"<unused99>', "\\<unused99>", "<unused99>x", '"content": "<unused99>"',
    'a"<image_soft_token>', '"<mask>', '"id"', "id", "{", "}", '"special": false',
)  # fmt: skip
"""Words that hold what is searched for, and are something else."""

SETTINGS: Final[Mapping[str, Any]] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "boi_token": "<start_of_image>",
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eoi_token": "<end_of_image>",
    "eos_token": "<eos>",
    "extra_special_tokens": {
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
    },
    "image_token": "<image_soft_token>",
    "model_max_length": 1_000_000_000_000_000_019_884_624_838_656,
    "pad_token": "<pad>",
    "processor_class": "Gemma3Processor",
    "sp_model_kwargs": None,
    "spaces_between_special_tokens": False,
    "tokenizer_class": "GemmaTokenizer",
    "unk_token": "<unk>",
    "use_default_system_prompt": False,
}  # fmt: skip
"""tokenizer_config.json without its added_tokens_decoder; the names are those of the published files."""

PREPROCESSOR: Final[Mapping[str, Any]] = {
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pan_and_scan": None,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "Gemma3ImageProcessor",
    "image_seq_length": 256,
    "image_std": [0.5, 0.5, 0.5],
    "pan_and_scan_max_num_crops": None,
    "pan_and_scan_min_crop_size": None,
    "pan_and_scan_min_ratio_to_activate": None,
    "processor_class": "Gemma3Processor",
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 896, "width": 896},
}


@cache
def tokenizer_text() -> str:
    """Return tokenizer.json as the tokenizers library writes it."""
    words = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", "\n\n", *map(chr, range(33, 127)), "ab", "▁ab"]
    words = list(dict.fromkeys([*words, *LOOKALIKES]))
    vocabulary: dict[str, int] = {}
    ordinary = iter(words)
    for number in range(VOCABULARY):
        vocabulary[TAGS.get(number) or next(ordinary, f"▁word{number}")] = number
    made = Tokenizer(
        models.BPE(
            vocabulary, [("a", "b"), ("▁", "ab"), ("\n", "\n")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
        )
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing("<bos> $A", "<bos> $A <bos> $B", [("<bos>", 2)])
    for number, tag in TAGS.items():
        made.add_tokens([AddedToken(tag, normalized=False, special=number in SPECIAL)])
    made.add_special_tokens([AddedToken("<image_soft_token>", normalized=False, special=True)])
    assert made.token_to_id("<image_soft_token>") == VOCABULARY
    return made.to_str(pretty=True)


def moved(text: str) -> dict[str, Any]:
    """Return the parsed tokenizer.json with the image token moved."""
    document: dict[str, Any] = json.loads(text)
    document["added_tokens"] = [entry for entry in document["added_tokens"] if entry["id"] != VOCABULARY]
    for entry in document["added_tokens"]:
        if entry["content"] in ("<unused99>", "<mask>"):
            entry["special"] = True
        if entry["content"] == "<unused99>":
            entry["content"] = "<image_soft_token>"
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {
        "<image_soft_token>" if number == 256_001 else word: number for word, number in vocabulary.items()
    }
    return document


def write_tokenizer(folder: Path) -> None:
    """Return all four tokenizer files of a published Gemma 3."""
    text = tokenizer_text()
    (folder / "tokenizer.json").write_text(text)
    decoder = {
        str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
        for entry in json.loads(text)["added_tokens"]
    }
    write_json(folder / "tokenizer_config.json", {**SETTINGS, "added_tokens_decoder": decoder})
    names = {key: value for key, value in SETTINGS.items() if key.endswith("_token") and isinstance(value, str)}
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "added_tokens.json", {"<image_soft_token>": VOCABULARY})


def write_processor(folder: Path, *, side: int, tokens: int) -> None:
    """Return preprocessor_config.json and processor_config.json as on the Hub."""
    size = {"height": side, "width": side}
    write_json(folder / "preprocessor_config.json", {**PREPROCESSOR, "image_seq_length": tokens, "size": size})
    write_json(folder / "processor_config.json", {"image_seq_length": tokens, "processor_class": "Gemma3Processor"})


def write_nested_processor(folder: Path, *, side: int, tokens: int) -> None:
    """Return only processor_config.json, as transformers 5 saves it without null values."""
    image = {key: value for key, value in PREPROCESSOR.items() if value is not None and key != "processor_class"}
    image |= {"image_seq_length": tokens, "size": {"height": side, "width": side}}
    document = {"image_processor": image, "image_seq_length": tokens, "processor_class": "Gemma3Processor"}
    write_json(folder / "processor_config.json", document)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False))
