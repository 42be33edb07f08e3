"""Settings next to the weights are changed, removed or retyped, and the manifest resealed: all are found."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import convert
from t5g2convert.checkpoint.folder import read_json_object
from tests.parity.mutations import Bench, Document, Tally, close, leaves, parent_of, plausible, put, setting_name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("same_source", "without_passes")]

GENERATION: Final[Document] = {
    "bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "cache_implementation": "hybrid", "do_sample": True,
    "top_k": 64, "top_p": 0.95, "repetition_penalty": 1.1, "suppress_tokens": [5], "bad_words_ids": [[7, 8]],
    "stop_strings": ["###"], "max_new_tokens": 512, "sequence_bias": [[[7], -1.0]], "of_a_fork": {"deep": {"value": 3}},
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 2.0},
}  # fmt: skip
TOKENIZER: Final[Document] = {
    "tokenizer_class": "GemmaTokenizer", "model_max_length": 8192, "add_bos_token": True, "padding_side": "left",
    "chat_template": "{{ messages }}", "extra_special_tokens": {"image_token": "<image_soft_token>"}, "scale": 1.0,
}  # fmt: skip
FILES: Final = ("generation_config.json", "tokenizer_config.json", "config.json")


@pytest.fixture
def made(demo_source: Path, tmp_path: Path) -> Bench:
    (demo_source / "generation_config.json").write_text(json.dumps(GENERATION))
    path = demo_source / "tokenizer_config.json"
    given = read_json_object(path) if path.exists() else {}
    path.write_text(json.dumps({**given, **TOKENIZER}))
    convert(demo_source, tmp_path / "converted")
    return Bench.of(demo_source, tmp_path / "converted", tmp_path / "bench")


def others(path: tuple[str | int, ...], value: Any) -> Iterator[Any]:
    """Return another value, and the same value with another type."""
    yield plausible(path, value)
    if isinstance(value, bool):
        yield int(value)
    elif isinstance(value, int):
        yield float(value)
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    if value is not None:
        yield None


@pytest.mark.parametrize("family", ["a setting beside the weights"])
def test_a_damaged_setting_next_to_the_weights_is_found(family: str, made: Bench) -> None:
    assert made.judge().passed
    tally = Tally()
    for file in FILES:
        document = read_json_object(made.folder / file)
        for path, value in leaves(document):
            for other in others(path, value):
                made.edit(file, partial(put, path=path, value=other))
                tally.add(f"{file}: {setting_name(path)} = {other!r}", made.resealed())

            def remove(document: Document, path: tuple[str | int, ...] = path) -> None:
                parent_of(document, path).pop(path[-1])

            made.edit(file, remove)
            tally.add(f"{file}: no {setting_name(path)}", made.resealed())
        made.edit(file, lambda document: document.update(a_stranger=1))
        tally.add(f"{file}: a stranger", made.resealed())
    close(tally, family)
