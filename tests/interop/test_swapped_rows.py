"""A map with the targets of two rows swapped plans and loads; parity must refuse it."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
import yaml

from t5g2convert import convert
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.name_patterns import index_of
from t5g2convert.mapping.schema import Row
from tests.interop.judge import judge
from tests.models.twins import TWINS, write_twin

ROWS = [row for row in find_map("gemma3").map.weights if row.from_ is not None and row.op.carries]


def alike(one: Row, other: Row) -> bool:
    """Return rows with targets that can be swapped with all names and shapes still right."""
    assert one.from_ is not None
    assert other.from_ is not None
    same_kind = one.shape == other.shape and one.to.keys() == other.to.keys()
    return same_kind and index_of(one.from_) == index_of(other.from_)


SWAPS = [
    pytest.param(one, other, part, id=f"{part}:{one.from_}~{other.from_}")
    for one, other in combinations(ROWS, 2)
    if alike(one, other)
    for part in one.to
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swaps") / "source"
    write_twin(next(twin for twin in TWINS if twin.name == "images-8"), folder)
    return folder


@pytest.mark.sampled
@pytest.mark.parametrize(("one", "other", "part"), SWAPS)
def test_swapped_targets_break_parity(one: Row, other: Row, part: str, source: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(find_map("gemma3").path.read_text())
    rows = {
        item["from"]: item["to"]
        for item in document["weights"]
        if "from" in item and "scaled_row" not in item.get("op", {})
    }
    rows[one.from_][part], rows[other.from_][part] = rows[other.from_][part], rows[one.from_][part]
    (tmp_path / "swapped.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    convert(source, tmp_path / "out", mapping=str(tmp_path / "swapped.yaml"))
    judgement = judge(source, tmp_path / "out", torch.bfloat16)
    assert judgement.complaints == []
    differing = {"encoder": judgement.encoder, "decoder": judgement.decoder, "vision": judgement.vision}
    assert differing.pop(part)
    assert not any(differing.values())


def test_there_are_swaps_of_every_part() -> None:
    assert {param.values[2] for param in SWAPS} == {"encoder", "decoder", "vision"}
    assert len(SWAPS) > 50
