"""The closed world in full: every source tensor in turn, and what a map may do with it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import CheckpointError, MappingError, plan
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor, open_checkpoint
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.resolution import resolve
from t5g2convert.mapping.weightmap import LoadedMap

Tensors = dict[str, StoredTensor]
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("demo") / "source"
    build_demo_source(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def gemma3() -> LoadedMap:
    return find_map("gemma3")


def refusal(checkpoint: Checkpoint, gemma3: LoadedMap, tensors: Mapping[str, StoredTensor]) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        resolve(gemma3, replace(checkpoint, tensors=tensors))
    return caught.value


def without(tensors: Mapping[str, StoredTensor], *names: str) -> Tensors:
    return {name: stored for name, stored in tensors.items() if name not in names}


def test_I5_each_tensor_in_turn_is_missed(sound: Checkpoint, gemma3: LoadedMap, record_property: Record) -> None:
    resolve(gemma3, sound)
    for name in sound.tensors:
        error = refusal(sound, gemma3, without(sound.tensors, name))
        assert error.details == (f"missing: {name}",)
        assert error.message.endswith(": 1 missing")
    record_property("dropped_tensors", len(sound.tensors))


def misspellings(name: str) -> Iterator[str]:
    """Misspell a name as people and tools do."""
    head, _, tail = name.rpartition(".")
    yield f"{head}.{tail}s"
    yield f"{head}_{tail}"
    yield name[: len(name) // 2] + name[len(name) // 2 + 1 :]
    yield name.replace("weight", "wieght").replace("bias", "bais")


def test_I5_each_renamed_tensor_is_reported_with_its_nearest_name(
    sound: Checkpoint, gemma3: LoadedMap, record_property: Record
) -> None:
    count = 0
    for name, stored in sound.tensors.items():
        for wrong in set(misspellings(name)) - {name}:
            error = refusal(sound, gemma3, without(sound.tensors, name) | {wrong: stored})
            assert error.details == (
                f"missing: {name} (did you mean {wrong}?)",
                f"unused: {wrong} (did you mean {name}?)",
            )
            count += 1
    record_property("renamed_tensors", count)
    assert count > 500


@pytest.mark.parametrize("prefix", ["language_model.model.layers.", "vision_tower.vision_model.encoder.layers."])
def test_I5_each_missing_layer_and_an_extra_one_are_reported(prefix: str, sound: Checkpoint, gemma3: LoadedMap) -> None:
    layers = sorted({name[len(prefix) :].split(".")[0] for name in sound.tensors if name.startswith(prefix)})
    assert len(layers) in (2, 8)
    for layer in layers:
        gone = [name for name in sound.tensors if name.startswith(f"{prefix}{layer}.")]
        error = refusal(sound, gemma3, without(sound.tensors, *gone))
        assert sorted(error.details) == sorted(f"missing: {name}" for name in gone)
        extra = {name.replace(f"{prefix}{layer}.", f"{prefix}{len(layers)}."): sound.tensors[name] for name in gone}
        error = refusal(sound, gemma3, {**sound.tensors, **extra})
        assert sorted(error.details) == sorted(f"unused: {name}" for name in extra)


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ("language_model.model.embed_tokens.weight", ["vocab_size", "hidden_size"]),
        ("language_model.model.layers.3.self_attn.q_proj.weight", ["num_attention_heads", "head_dim", "hidden_size"]),
        ("language_model.model.layers.3.self_attn.k_proj.weight", ["num_key_value_heads", "head_dim", "hidden_size"]),
        ("language_model.model.layers.3.self_attn.q_norm.weight", ["head_dim"]),
        ("language_model.model.layers.3.mlp.up_proj.weight", ["intermediate_size", "hidden_size"]),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", ["vision_config", "intermediate_size"]),
        ("vision_tower.vision_model.embeddings.position_embedding.weight", ["image_size", "patch_size"]),
    ],
)
def test_I8_a_wrong_shape_is_reported_with_the_config_fields_that_imply_it(
    row: str, fields: list[str], sound: Checkpoint, gemma3: LoadedMap
) -> None:
    stored = sound.tensors[row]
    wrong = replace(stored, entry=replace(stored.entry, shape=(*stored.entry.shape[:-1], 5)))
    (detail,) = refusal(sound, gemma3, {**sound.tensors, row: wrong}).details
    assert f"{row} has shape {list(wrong.entry.shape)}, expected {list(stored.entry.shape)}" in detail
    assert [field for field in fields if field not in detail] == []


@pytest.mark.parametrize("dtype", ["I8", "U8", "F8_E4M3", "F64", "BOOL"])
def test_I8_a_wrong_dtype_is_reported_with_the_expected_ones(dtype: str, sound: Checkpoint, gemma3: LoadedMap) -> None:
    for name, stored in sound.tensors.items():
        wrong = replace(stored, entry=replace(stored.entry, dtype=dtype))
        (detail,) = refusal(sound, gemma3, {**sound.tensors, name: wrong}).details
        assert detail == f"misshapen: {name} has dtype {dtype}, expected one of BF16, F16, F32"


# Maps that fit no model, or fit it twice: found when a model is given

GOOD = find_map("gemma3").path.read_text()
UP = "{text}layers.{layer}.mlp.up_proj.weight"
NORM = '  - from: "{text}norm.weight"'
LITERAL_UP = "language_model.model.layers.{layer}.mlp.up_proj.weight"


def mine(tmp_path: Path, *edits: tuple[str, str]) -> tuple[Path, str]:
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path, text


def map_refusal(sound: Checkpoint, path: Path) -> MappingError:
    with pytest.raises(MappingError) as caught:
        plan(sound.path, mapping=str(path))
    return caught.value


def assert_points_at(error: MappingError, path: Path, text: str, node: str) -> None:
    """`file:line:column`, the line, and a caret under the node."""
    where, line, column = (error.where or "").rsplit(":", 2)
    assert where == str(path)
    shown = text.split("\n")[int(line) - 1]
    assert shown[int(column) - 1 :].startswith(node)
    assert f"  {shown}\n  {' ' * (int(column) - 1)}^" in error.message


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("{text}layers.{layer}.mlp.up_prj.weight", "up_proj"),
        ("{text}layer.{layer}.mlp.up_proj.weight", "layers"),
        ("{text}layers.{layer}.mlp.up_proj.bias", "weight"),
    ],
)
def test_C2_a_row_that_matches_nothing_is_refused_with_its_position(
    wrong: str, meant: str, sound: Checkpoint, tmp_path: Path
) -> None:
    path, text = mine(tmp_path, (f'from: "{UP}"', f'from: "{wrong}"'))
    error = map_refusal(sound, path)
    assert_points_at(error, path, text, f'"{wrong}"')
    assert "matches nothing" in error.message
    assert "did you mean" in (error.hint or "")
    assert meant in (error.hint or "")


def test_C2_a_tensor_that_matches_two_rows_is_refused_at_the_second(sound: Checkpoint, tmp_path: Path) -> None:
    """Two spellings hide it in the map alone: the decoder's gate would come from up_proj."""
    gate = '      decoder: "model.decoder.layers.{layer}.mlp.gate_proj.weight"\n'
    row = (
        f'  - from: "{LITERAL_UP}"\n'
        '    to: {decoder: "model.decoder.layers.{layer}.mlp.gate_proj.weight"}\n'
        "    shape: [intermediate, hidden]\n"
    )
    path, text = mine(tmp_path, (gate, ""), (NORM, row + NORM))
    error = map_refusal(sound, path)
    assert_points_at(error, path, text, f'"{LITERAL_UP}"')
    assert "language_model.model.layers.0.mlp.up_proj.weight" in error.message


def test_C2_a_tensor_that_is_carried_and_dropped_is_refused(sound: Checkpoint, tmp_path: Path) -> None:
    drop = '  - from: "language_model.model.norm.weight"\n    because: "no need"\n'
    path, text = mine(tmp_path, ("drop:\n", f"drop:\n{drop}"))
    error = map_refusal(sound, path)
    assert_points_at(error, path, text, '"language_model.model.norm.weight"')


def test_C2_two_rows_with_one_target_are_refused_at_the_second(sound: Checkpoint, tmp_path: Path) -> None:
    """With one layer spelled out, so that the patterns differ."""
    path, text = mine(
        tmp_path,
        (
            'encoder: "model.encoder.norm.weight", decoder',
            'encoder: "model.encoder.layers.0.mlp.up_proj.weight", decoder',
        ),
    )
    error = map_refusal(sound, path)
    lines: list[Any] = [error.message, *error.details]
    assert any("model.encoder.layers.0.mlp.up_proj.weight" in line for line in lines)
    assert_points_at(error, path, text, '"model.encoder.layers.0.mlp.up_proj.weight"')
