"""Generated headers, indexes, configs and maps: read as the library reads them, or refused."""

import json
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.header import read_header
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.cli.demo import DEMO_CONFIG
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.conversion.plan.builder import build_plan
from t5g2convert.conversion.plan.builder import plan as make_plan
from t5g2convert.errors import CheckpointError, MappingError, T5g2Error
from t5g2convert.mapping import library
from t5g2convert.mapping.inspection import inspect
from t5g2convert.mapping.weightmap import load_map
from tests.fuzz.strategies import BROKEN_FILES, JSON, changed, changed_yaml, indexes, mutated, sound_files
from tests.processes.memory import memory_limit

RecordProperty = Callable[[str, object], None]
MEMORY = 256 * 1024**2
GOOD_MAP = (library.mappings_folder() / "gemma3.yaml").read_text()

MANY = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
# At most three values are changed; shrinking would take minutes when memory runs out.
UNSHRUNK = settings(MANY, phases=[Phase.explicit, Phase.generate], report_multiple_bugs=False)


@pytest.fixture
def soon() -> Iterator[None]:
    """Fail a test after twenty seconds: the input hangs the program."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def source(demo_source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the demo source; read the shipped map only once."""
    monkeypatch.setattr(library, "load_map", cache(library.load_map))
    return demo_source


def written_json(document: Any) -> str:
    """Parse strict JSON."""
    text = json.dumps(document, allow_nan=False, ensure_ascii=False)
    text.encode()
    return text


def assert_clear_refusal(error: T5g2Error) -> None:
    """Require a one-line error that names the problem and the place."""
    assert error.message
    assert error.where
    assert isinstance(error, MappingError) or "\n" not in error.message


def assert_points(error: MappingError, path: Path) -> None:
    """Require one line of text, the line of the file, and a caret."""
    assert re.fullmatch(rf"{re.escape(str(path))}:[1-9][0-9]*:[1-9][0-9]*", error.where or ""), error.where
    assert error.message.count("\n") == 2, error.message
    assert error.message.endswith("^")


@pytest.mark.slow
def test_any_header_is_refused_or_read_exactly_as_the_library_reads_it(
    tmp_path: Path, record_property: RecordProperty
) -> None:
    path = tmp_path / "x.safetensors"
    count: Counter[str] = Counter()

    @settings(MANY, max_examples=1000)
    @given(BROKEN_FILES)
    def judge(content: bytes) -> None:
        count["tried"] += 1
        path.write_bytes(content)
        try:
            header = read_header(path)
        except CheckpointError as error:
            assert_clear_refusal(error)
            return
        count["read"] += 1
        library_read = {name: (item["dtype"], item["shape"], item["data"]) for name, item in deserialize(content)}
        assert library_read == {
            name: (entry.dtype, list(entry.shape), content[entry.start : entry.end])
            for name, entry in header.tensors.items()
        }

    judge()
    assert 0 < count["read"] < count["tried"] / 2
    record_property("bad_inputs", count["tried"])


def test_every_sound_header_is_read_exactly_as_the_library_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    @settings(MANY, max_examples=200)
    @given(sound_files())
    def judge(content: bytes) -> None:
        path.write_bytes(content)
        header = read_header(path)
        assert {name: (item["dtype"], tuple(item["shape"])) for name, item in deserialize(content)} == {
            name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()
        }

    judge()


def test_any_index_is_refused_or_opened(source: Path, record_property: RecordProperty) -> None:
    names = list(read_header(source / SINGLE_FILE).tensors)
    (source / SINGLE_FILE).rename(source / "weights.safetensors")
    count: Counter[str] = Counter()

    @settings(UNSHRUNK, max_examples=400)
    @given(indexes(names, "weights.safetensors"))
    def judge(text: str) -> None:
        count["tried"] += 1
        (source / INDEX_FILE).write_text(text)
        try:
            checkpoint = open_checkpoint(source)
        except CheckpointError as error:
            assert_clear_refusal(error)
            return
        assert checkpoint.tensors.keys() == set(names)
        assert {stored.file for stored in checkpoint.tensors.values()} == {"weights.safetensors"}

    judge()
    record_property("bad_inputs", count["tried"])


def judge_config(source: Path, text: str) -> bool:
    """Return whether a config is planned; require a sound plan or a clear refusal."""
    (source / "config.json").write_text(text)
    with memory_limit(MEMORY):
        try:
            inspect(source)
        except T5g2Error as error:
            assert_clear_refusal(error)
        try:
            plan = make_plan(source)
        except T5g2Error as error:
            assert_clear_refusal(error)
            return False
        written_json(plan.to_json())
        written_json(plan.generation_config)
    weights = (source / SINGLE_FILE).stat().st_size
    assert weights < plan.nbytes < 3 * weights
    assert all(0 <= tensor.start <= tensor.end <= plan.nbytes and tensor.elements >= 0 for tensor in plan.tensors)
    assert len(plan.config["decoder"]["layer_types"]) == 8
    return True


def test_any_config_is_refused_or_planned_soundly(source: Path, record_property: RecordProperty) -> None:
    count: Counter[bool] = Counter()

    @settings(UNSHRUNK, max_examples=600)
    @given(changed(DEMO_CONFIG))
    def judge(text: str) -> None:
        count[judge_config(source, text)] += 1

    judge()
    assert count[True]
    assert count[False]
    record_property("bad_inputs", count.total())


def test_any_end_tokens_for_generation_are_refused_or_token_ids(source: Path, record_property: RecordProperty) -> None:
    count: Counter[bool] = Counter()

    @settings(UNSHRUNK, max_examples=200)
    @given(JSON)
    def judge(tokens: Any) -> None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens}))
        try:
            chosen = make_plan(source).generation_config["eos_token_id"]
        except CheckpointError as error:
            assert_clear_refusal(error)
            count[False] += 1
            return
        count[True] += 1
        assert all(type(token) is int for token in (chosen if isinstance(chosen, list) else [chosen]))

    judge()
    record_property("bad_inputs", count.total())


EXTRA = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    "layer_types": ["sliding_attention"] * 7 + ["full_attention"],
    "sliding_window_pattern": 8,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
}
"""Settings that the demo leaves to their defaults."""


def test_any_text_settings_of_either_dialect_are_refused_or_planned_soundly(
    source: Path, record_property: RecordProperty
) -> None:
    count: Counter[bool] = Counter()

    @settings(UNSHRUNK, max_examples=600)
    @given(changed(EXTRA))
    def judge(text: str) -> None:
        # As text, to keep repeated keys.
        config = json.dumps(DEMO_CONFIG).replace(
            '"text_config": {', f'"text_config": {text[:-1]}{"," * (text != "{}")}'
        )
        count[judge_config(source, config)] += 1

    assert judge_config(source, json.dumps({**DEMO_CONFIG, "text_config": DEMO_CONFIG["text_config"] | EXTRA}))
    judge()
    assert count[True]
    assert count[False]
    record_property("bad_inputs", count.total())


DEPTHS = {"10,000": 10_000, "10,001": 10_001, "ten million": 10**7, "2^31": 2**31, "2^63": 2**63, "400 digits": 10**399}


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("depth", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("section", ["text_config", "vision_config"])
def test_a_depth_that_no_model_has_is_refused_soon_and_in_little_memory(
    depth: int, section: str, source: Path, record_property: RecordProperty
) -> None:
    config = {**DEMO_CONFIG, section: {**DEMO_CONFIG[section], "num_hidden_layers": depth}}
    assert not judge_config(source, json.dumps(config))
    record_property("bad_inputs", 1)


@pytest.mark.usefixtures("soon")
def test_a_shape_of_a_hundred_thousand_extents_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"a": {"dtype": "U8", "shape": [2**63] * 100_000, "data_offsets": [0, 0]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError):
        read_header(path)


EOI = """\
  - from: "{text}embed_tokens.weight"
    to: {embedding: "model.encoder.embed_tokens.eoi_embedding"}
    tied: ["model.decoder.embed_tokens.eoi_embedding"]
    shape: [rows, hidden]
    op: {scaled_row: eoi_token}
"""
EOI_OF_A_VECTOR = EOI.replace("embed_tokens.weight", "norm.weight").replace("rows, ", "").replace("eoi_token}", "3}")


def test_any_map_is_refused_at_its_place_or_planned_with(source: Path, record_property: RecordProperty) -> None:
    path = source / "map.yaml"
    checkpoint = open_checkpoint(source)
    count: Counter[str] = Counter()

    assert EOI in GOOD_MAP

    @settings(UNSHRUNK, max_examples=400)
    @given(st.one_of(changed_yaml(GOOD_MAP), mutated(GOOD_MAP.encode()).map(lambda raw: raw.decode(errors="replace"))))
    @example(GOOD_MAP.replace(EOI, EOI_OF_A_VECTOR))
    def judge(text: str) -> None:
        count["tried"] += 1
        path.write_text(text, newline="", errors="surrogatepass")
        try:
            loaded = load_map(path)
        except MappingError as error:
            assert_clear_refusal(error)
            assert_points(error, path)
            return
        count["loaded"] += 1
        try:
            plan = build_plan(Sources(checkpoint), PlanOptions(max_shard_bytes=100_000), loaded)
        except T5g2Error as error:
            assert_clear_refusal(error)
            return
        count["planned"] += 1
        written_json(plan.to_json())

    judge()
    assert count["tried"] > count["loaded"] > count["planned"] > 0
    record_property("bad_inputs", count["tried"])
