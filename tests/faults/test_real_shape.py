"""Damage to a conversion of the 270m at its real shape, 0.74 GB: every flipped bit is found and named."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from t5g2convert import convert
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source
from t5g2convert.parity.batches import Batch, token_batch
from t5g2convert.parity.checks.integrity import judge_integrity
from t5g2convert.parity.checks.text import ExpectedStacks, judge_text
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.models.sizes import FIELDS, SIZES
from tests.parity.mutations import place_of

PLACES: Final = 200
TOKENS: Final = 12
EOI_PLACE: Final = TOKENS // 3
"""Where `token_batch` puts the end-of-image token first."""

EXPONENT: Final = 0x40
"""The highest bit of the exponent, in the upper byte of a bfloat16."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("270m") / "source"
    folder.mkdir()
    config = {"model_type": "gemma3_text", "vocab_size": 262_144, "sliding_window": 512}
    config |= dict(zip(FIELDS, SIZES["270m"], strict=True))
    write_synthetic_source(folder, find_map("gemma3").map, config, seed=0)
    (folder / "tokenizer_config.json").write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    convert(source, source.parent / "out", max_shard_bytes=60_000_000)
    return source.parent / "out"


@contextmanager
def flipped(path: Path, place: int, bits: int) -> Iterator[None]:
    """Flip some bits of one byte of a file; restore it afterwards."""
    with path.open("r+b", buffering=0) as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ bits]))
        try:
            yield
        finally:
            file.seek(place)
            file.write(bytes([byte]))


@pytest.mark.slow
def test_V2_one_byte_at_200_random_places_of_a_real_folder_names_the_file(
    converted: Path, record_property: Callable[[str, object], None]
) -> None:
    """Damage one byte in several files at once, to avoid reading 0.74 GB 200 times."""
    files = read_manifest(converted).files
    assert judge_integrity(converted, files).passed
    starts = {name: header.data_start for name, header in open_checkpoint(converted).files.items()}
    names = sorted({path.name for path in converted.iterdir()} - {MANIFEST_FILE})
    rng = random.Random(2)
    tried = 0
    while tried < PLACES:
        damaged = sorted(rng.sample(names, 10))
        with ExitStack() as stack:
            for name in damaged:
                # In every other weight file the byte is in the header, a small part of the file.
                size = starts[name] if name in starts and rng.random() < 0.5 else (converted / name).stat().st_size
                stack.enter_context(flipped(converted / name, rng.randrange(size), rng.randrange(1, 256)))
            check = judge_integrity(converted, files)
        assert sorted(check.offenders) == [f"{name} has a different sha256" for name in damaged]
        tried += len(damaged)
    assert judge_integrity(converted, files).passed
    record_property("faults", {"bytes flipped": tried})


@pytest.mark.slow
def test_V2_one_byte_anywhere_in_a_real_manifest_is_found(
    converted: Path, record_property: Callable[[str, object], None]
) -> None:
    path = converted / MANIFEST_FILE
    rng = random.Random(4)
    for place in rng.sample(range(path.stat().st_size), 50):
        with flipped(path, place, rng.randrange(1, 256)), pytest.raises(CheckpointError) as error:
            read_manifest(converted)
        assert error.value.where == str(path)
    read_manifest(converted)
    record_property("faults", {"bytes flipped": 50})


class Judge:
    """Repeatable decoder and encoder parity on a few tokens."""

    def __init__(self, source: Path, converted: Path) -> None:
        self.gemma = Gemma3Reference(open_checkpoint(source))
        self.checkpoint: Checkpoint = open_checkpoint(converted)
        target = T5Gemma2Reference(self.checkpoint)
        vocab, ending = target.decoder.settings.vocab_size, target.model.tokens.eoi_token_index
        self.batch: Batch = token_batch(vocab, TOKENS, never=target.reserved, placed=ending)

    def __call__(self) -> dict[str, str | None]:
        """Return the failed parity checks and the first difference of each."""
        target = T5Gemma2Reference(self.checkpoint)
        checks = judge_text(
            ExpectedStacks.both(self.gemma), target, self.batch, None, tolerance=0, progress=lambda _: None
        )
        return {
            check.name: None if check.figures is None else check.figures.departs for check in checks if not check.passed
        }


@pytest.fixture(scope="module")
def judge(source: Path, converted: Path) -> Judge:
    return Judge(source, converted)


def of_each_class(checkpoint: Checkpoint) -> dict[str, str]:
    """Return a tensor of each class, from a random layer."""
    rng = random.Random(1)
    classes: dict[str, list[str]] = {}
    for name, tensor in checkpoint.tensors.items():
        if "vision" not in name and "multi_modal" not in name and tensor.entry.nbytes:
            classes.setdefault(re.sub(r"\.\d+\.", ".N.", name), []).append(name)
    return {kind: rng.choice(names) for kind, names in sorted(classes.items())}


@pytest.mark.slow
def test_V1_one_bit_in_each_class_of_tensor_of_a_real_folder_is_named_by_its_parity(
    judge: Judge, record_property: Callable[[str, object], None]
) -> None:
    chosen = of_each_class(judge.checkpoint)
    assert len(chosen) == 2 * 13 + 2 + 2, "13 of a layer and a norm in each stack; the table and the end-of-image row"
    assert judge() == {}
    rng = random.Random(3)
    for name in chosen.values():
        stored = judge.checkpoint.tensors[name]
        width = 2 * stored.entry.shape[-1]
        row = stored.entry.start
        if name.endswith("embed_tokens.weight"):
            row += int(judge.batch.ids_BT[0, 0]) * width  # a row used both as input embedding and in the softmax
        elif len(stored.entry.shape) > 1:
            row += rng.randrange(stored.entry.shape[0]) * width
        place = row + 2 * rng.randrange(stored.entry.shape[-1]) + 1
        with flipped(judge.checkpoint.path / stored.file, place, EXPONENT):
            failed = judge()
        if "embed_tokens" in name:
            # One matrix, and one end-of-image row, serve both stacks.
            at = f"embed_tokens, at token {0 if name.endswith('weight') else EOI_PLACE} of sequence 0"
            assert failed == {"decoder_parity": at, "encoder_parity": at}
        else:
            parity, where = place_of(name)
            assert list(failed) == [parity], name
            kinds = "(sliding|full)_attention"
            assert re.fullmatch(re.escape(where).replace(r"\{kind\}", kinds), str(failed[parity])), name
    assert judge() == {}
    record_property("faults", {"bits flipped": len(chosen)})


LIMITED: Final = """
import resource, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from t5g2convert.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_V3_a_real_folder_is_verified_by_a_process_that_may_take_three_fifths_of_its_size(
    source: Path, converted: Path
) -> None:
    size = sum(path.stat().st_size for folder in (source, converted) for path in folder.iterdir())
    command = [sys.executable, "-c", LIMITED, str(size * 3 // 5), "verify", converted, "--source", source, "--json"]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["passed"]
    command[3] = str(size // 8)
    assert subprocess.run(list(map(str, command)), capture_output=True, check=False).returncode != 0, "it is a limit"
