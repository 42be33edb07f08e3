"""Short runs in this process, and runs that are refused before they start or resume."""

import errno
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from t5g2convert.adaptation.adapt import adapt, foresee
from t5g2convert.adaptation.data.image_columns import ImageSource
from t5g2convert.adaptation.train import checkpoints, loop
from t5g2convert.adaptation.train import samples as samples_of_run
from t5g2convert.adaptation.train.checkpoint_manifest import (
    check_files,
    complete_checkpoints,
    read_checkpoint_manifest,
)
from t5g2convert.adaptation.train.checkpoint_writer import HashedFiles
from t5g2convert.adaptation.train.distributed import ReportedElsewhere
from t5g2convert.adaptation.train.history import check_same, identity, newest, read_history
from t5g2convert.adaptation.train.metrics import Metrics, read_metrics
from t5g2convert.adaptation.train.preflight import check_rope, prepare, read_limits
from t5g2convert.adaptation.train.run_folder import check_vacant, locked
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.train.teacher import check_teacher
from t5g2convert.adaptation.ul2 import dataset
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
from t5g2convert.adaptation.ul2.mixture import Mixture, Task
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError, DataError, Interrupted, OutputError, T5g2Error, UsageError
from tests.adaptation.runs import SHARD
from tests.adaptation.trainings import changed, request_of, run, settings_of, tensors_of
from tests.conftest import TwinFolder

ENCODER, TOWER = "model.encoder.layers.*", "model.encoder.vision_tower.*"
PROJECTOR = "model.encoder.multi_modal_projector."


MANY_SPANS = Mixture(tasks=(Task(name="many", kind="spans", rate=0.45, mean_span=1.0, weight=1),))
"""Nearly half of all tokens are spans of one token, which need more sentinels than the vocabulary has."""


@pytest.mark.usefixtures("one_process")
def test_freeze_until_trains_only_the_named_tensors(small: Path, tmp_path: Path) -> None:
    settings = settings_of(freeze_until=2, trainable=(ENCODER,), precision="float32")
    outcome, _ = run(request_of(small, tmp_path / "run", settings))
    before = {name: tensor.float() for name, tensor in load_file(small / "model/model.safetensors").items()}
    frozen, all_trained = tensors_of(tmp_path / "run", 2), tensors_of(tmp_path / "run", 4)
    moved = {name for name, tensor in frozen.items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in frozen if name.startswith("model.encoder.layers.")}
    moved = {name for name, tensor in all_trained.items() if not torch.equal(tensor, before[name])}
    # No text has an end-of-image token, and without images the projector is not trained.
    assert moved == all_trained.keys() - {"model.encoder.embed_tokens.eoi_embedding"}
    assert not any("projector" in name for name in all_trained)
    assert outcome.trained == sum(tensor.numel() for tensor in all_trained.values())


@pytest.mark.usefixtures("one_process")
def test_patterns_that_match_nothing_are_refused_and_leave_the_folder_free(small: Path, tmp_path: Path) -> None:
    # Next to a pattern that matches. The second is found in the launched processes, once the trained tensors are known.
    for pattern, expected in (("encoder.*", r"the model's \d+ tensors"), (TOWER, r"the 5\d trained tensors")):
        request = request_of(small, tmp_path / "run", settings_of(freeze_until=2, trainable=(ENCODER, pattern)))
        with pytest.raises(UsageError, match=rf"--trainable {re.escape(pattern)} matches none of {expected}"):
            run(request)
        check_vacant(tmp_path / "run")


@pytest.mark.usefixtures("one_process")
def test_a_step_that_trains_nothing_is_made_too(small: Path, tmp_path: Path) -> None:
    settings = settings_of(image_every=2, freeze_until=2, steps=3, trainable=(f"{PROJECTOR}*",), precision="float32")
    _, steps = run(request_of(small, tmp_path / "run", settings))
    assert [step.kind for step in steps] == ["text", "images", "text"]
    assert steps[0].grad_norm == 0.0
    assert min(step.grad_norm for step in steps[1:]) > 0.0
    before, after = load_file(small / "model/model.safetensors"), tensors_of(tmp_path / "run", 2)
    assert {name for name in after if not torch.equal(after[name], before[name].float())} == {
        name for name in after if name.startswith(PROJECTOR)
    }


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model/run", "model/run: lies inside the source folder"),
        ("data/run", "data/run: lies inside the source folder"),
        ("", "contains the source folder"),
    ],
)
def test_a_run_in_a_source_folder_is_refused_before_the_first_step(place: str, message: str, small: Path) -> None:
    with pytest.raises(OutputError, match=message):
        foresee(request_of(small, small / place, settings_of()))


@pytest.mark.usefixtures("one_process")
def test_the_time_of_a_step_excludes_the_checkpoint_and_the_log_is_flushed_first(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, fsync, flushed, clock = checkpoints.save, os.fsync, [], [0.0]
    perf_counter = time.perf_counter

    def slow_save(*args: Any, **options: Any) -> Path:
        assert (tmp_path / "run/metrics.jsonl").stat().st_ino in flushed
        flushed.clear()
        clock[0] += 3600 if args[2] == 1 else 0
        return save(*args, **options)

    def noted(fd: int) -> None:
        flushed.append(os.fstat(fd).st_ino)
        fsync(fd)

    monkeypatch.setattr(checkpoints, "save", slow_save)
    monkeypatch.setattr(loop.time, "perf_counter", lambda: perf_counter() + clock[0])
    monkeypatch.setattr(os, "fsync", noted)
    request = request_of(small, tmp_path / "run", settings_of(steps=2, precision="float32"))
    _, steps = run(changed(request, save_every=1))
    assert steps[1].tokens / steps[1].tokens_per_second < 3600


@pytest.mark.usefixtures("one_process")
def test_a_checkpoint_that_is_being_removed_is_complete_or_absent(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def die(folder: Path, *args: Any, **options: Any) -> None:
        if "step-00000002" in str(folder):
            (Path(folder) / "checkpoint.json").unlink()
            raise OSError(errno.EIO, "Input/output error", str(folder))
        remove(folder, *args, **options)

    request = request_of(small, tmp_path / "run", settings_of(steps=4, precision="float32"))
    request = changed(request, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(OutputError, match="Input/output error"):
            run(request)
    assert list(complete_checkpoints(tmp_path / "run")) == [4]
    run(changed(request, resume=True))
    assert [item.name for item in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000004"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_process")
def test_distillation_in_bfloat16_with_images_learns_and_names_the_teacher(small: Path, tmp_path: Path) -> None:
    settings = settings_of(image_every=3, lr=2e-3, steps=9, batch_tokens=512)
    request = request_of(small, tmp_path / "run", settings, kd=small / "parent", recompute="full", export=True)
    outcome, steps = run(request)
    text = [step for step in steps if step.kind == "text"]
    # Cross-entropy alone would start at log 256, 5.5; the parent is nearly as random as its child.
    assert text[-1].loss < text[0].loss < 1.0
    assert all(tensor.dtype == torch.float32 for tensor in tensors_of(tmp_path / "run", 9).values())
    teacher = outcome.settings.teacher
    assert teacher is not None
    assert len(teacher) == 64
    manifest = json.loads((tmp_path / "run/model/t5g2.json").read_text())
    assert manifest["adaptation"]["settings"]["teacher"] == teacher
    with pytest.raises(UsageError, match=r"teacher sha256 .*, now null"):
        run(changed(request, kd=None, resume=True))


@pytest.mark.usefixtures("one_process")
def test_recomputed_activations_change_nothing(small: Path, tmp_path: Path) -> None:
    settings = settings_of(precision="float32", steps=2)
    for name in ("none", "selective", "full"):
        run(request_of(small, tmp_path / name, settings, recompute=name))
    none, selective, full = (tensors_of(tmp_path / name, 2) for name in ("none", "selective", "full"))
    assert all(torch.equal(none[name], selective[name]) and torch.equal(none[name], full[name]) for name in none)


@pytest.mark.usefixtures("one_process")
def test_a_gradient_that_is_not_finite_stops_the_run(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "model", tmp_path / "model")
    from safetensors.torch import save_file

    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors["model.decoder.norm.weight"][0] = float("inf")
    save_file(tensors, tmp_path / "model/model.safetensors", {"format": "pt"})
    request = replace(request_of(small, tmp_path / "run", settings_of()), model=tmp_path / "model")
    with pytest.raises(DataError, match="the gradient of step 1 is not finite"):
        run(request)
    assert not complete_checkpoints(tmp_path / "run")


@pytest.mark.usefixtures("one_process")
def test_steps_with_a_gradient_that_is_not_finite_are_skipped_on_request(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get = loop.get_total_norm

    def broken(gradients: list[torch.Tensor]) -> Any:
        norm = get(gradients)
        return norm * float("nan") if len(made) == 1 else norm

    made: list[Metrics] = []
    monkeypatch.setattr(loop, "get_total_norm", broken)
    request = request_of(
        small, tmp_path / "run", settings_of(precision="float32"), save_every=1, keep=9, skip_nonfinite=1
    )
    adapt(request, begun=lambda notes: None, report=made.append)
    assert [step.grad_norm is None for step in made] == [False, True, False, False]
    assert "grad norm not finite, no update" in made[1].line
    assert read_metrics(tmp_path / "run/metrics.jsonl") == made
    first, second, third = (tensors_of(tmp_path / "run", step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(second[name], third[name]) for name in first)
    made.clear()
    with pytest.raises(DataError, match=r"the gradient of step 2 is not finite \(--skip-nonfinite N makes no update"):
        adapt(
            changed(replace(request, run=tmp_path / "other"), skip_nonfinite=0),
            begun=lambda notes: None,
            report=made.append,
        )


@pytest.mark.usefixtures("one_process")
def test_a_step_with_a_sample_that_cannot_be_made_is_not_finished(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataset.pixel_values
    calls: list[ImageSource] = []

    def second_is_lost(images: Sequence[ImageSource], model: Path) -> Any:
        calls.extend(images)
        if len(calls) == 2:
            raise DataError("no such file", where=str(images[0]))
        return made(images, model)

    monkeypatch.setattr(dataset, "pixel_values", second_is_lost)
    request = request_of(small, tmp_path / "run", settings_of(image_every=2))
    steps: list[Metrics] = []
    with pytest.raises(DataError, match="no such file"):
        adapt(changed(request, micro_batch=1, workers=0), begun=lambda notes: None, report=steps.append)
    assert [step.step for step in steps] == [1]
    # All documents of the step are tried, 256 tokens by 8.
    assert len(calls) == 32


@pytest.mark.usefixtures("one_process")
def test_data_without_text_suffices_if_every_step_uses_images(small: Path, tmp_path: Path) -> None:
    from t5g2convert.adaptation.data.documents import read_files
    from t5g2convert.adaptation.data.pack import pack
    from t5g2convert.cli.adapt import print_forecast

    pack(small / "model", tmp_path / "data", read_files([small / "texts/pictures.jsonl"], "text", lambda _: None))
    request = replace(request_of(small, tmp_path / "run", settings_of(image_every=1)), data=tmp_path / "data")
    found = foresee(request)
    print_forecast(found)
    assert (found.steps, found.image_steps, found.tasks, found.corpus, found.epochs) == (4, 4, (), 0, 0.0)
    _, steps = run(request)
    assert [step.kind for step in steps] == ["images"] * 4
    with pytest.raises(UsageError, match="--kd applies only to text"):
        foresee(changed(request, kd=small / "parent"))
    with pytest.raises(DataError, match="the corpus has 0 tokens"):
        foresee(changed(request, image_every=2))


@pytest.mark.usefixtures("one_process")
def test_a_folder_that_another_process_trains_into_is_refused(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(steps=2))
    with locked(tmp_path / "run"), pytest.raises(OutputError, match="another process is training in this folder"):
        run(changed(request, resume=True))
    run(request)
    check_same(tmp_path / "run", json.loads((tmp_path / "run/run.json").read_text()))


@pytest.mark.parametrize(("rank", "expected"), [(0, OutputError), (1, ReportedElsewhere)])
def test_a_full_disk_is_reported_by_the_first_process_only(
    rank: int, expected: type[T5g2Error], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        # As torch does on all processes when one fails.
        raise CheckpointException("", {1: _wrap_exception(OSError(errno.ENOSPC, "No space left on device"))})

    monkeypatch.setattr(checkpoints, "save_distributed", full)
    engine: Any = SimpleNamespace(global_rank=rank, world_size=1, barrier=lambda: None)
    state = checkpoints.State({}, torch.optim.AdamW([torch.zeros(1)]))
    with pytest.raises(T5g2Error) as caught:
        checkpoints.save(engine, tmp_path, 1, state, settings_of(), keep=1)
    assert type(caught.value) is expected
    assert caught.value.exit_code == OutputError.exit_code
    assert ("No space left" in str(caught.value)) == (rank == 0)


@pytest.mark.usefixtures("one_process")
def test_damaged_data_is_found_when_a_run_starts(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "data", tmp_path / "data")
    path = tmp_path / "data/text-00000.bin"
    tokens = bytearray(path.read_bytes())
    tokens[400] ^= 1
    path.write_bytes(tokens)
    request = replace(request_of(small, tmp_path / "run", settings_of()), data=tmp_path / "data")
    foresee(request)
    with pytest.raises(DataError, match="their sha256 differs") as raised:
        run(request)
    assert raised.value.details == ("text-00000.bin",)
    assert not (tmp_path / "run").exists()


def _not_json(folder: Path) -> None:
    (folder / "checkpoint.json").write_text("{")


def _no_record(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def _edited(key: str, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**document, key: value}))

    return edit


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run", ignore=shutil.ignore_patterns("model")))


@pytest.fixture
def description(trained: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((trained / "run/run.json").read_text())
    return document


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_not_json, "is not valid JSON"),
        (_no_record, "is missing"),
        (_edited("settings_sha256", "0" * 64), "settings_sha256 is 0000"),
        (_edited("objective_sha256", "0" * 64), "objective_sha256 is 0000"),
        (_edited("step", 40), "is the checkpoint of step 40, renamed"),
        (_edited("format", 3), "format"),
        (_edited("format", 1), r"has format 1 \(t5g2convert 0\.1\.0\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    damage: Callable[[Path], None], message: str, copied: Path, description: dict[str, Any]
) -> None:
    settings = Settings.model_validate_json(json.dumps(description["settings"]))
    assert newest(copied, settings)[0] == 60
    damage(copied / "checkpoints/step-00000060")
    with pytest.raises(CheckpointError, match=message):
        newest(copied, settings)


def test_a_flipped_byte_or_a_lost_file_of_a_checkpoint_is_found(copied: Path) -> None:
    folder = copied / "checkpoints/step-00000060"
    record = read_checkpoint_manifest(folder)
    assert list(record.files) == [SHARD]
    check_files(folder, record)
    for name in record.files:
        data = (folder / name).read_bytes()
        middle = len(data) // 2
        (folder / name).write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        with pytest.raises(CheckpointError, match="its sha256 differs"):
            check_files(folder, record)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="cannot be read"):
            check_files(folder, record)
        (folder / name).write_bytes(data)


def test_a_recorded_verification_does_not_change_the_identity(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "model", tmp_path / "model")
    before, path = identity(tmp_path / "model"), tmp_path / "model/t5g2.json"
    assert before == json.loads(path.read_text())["sha256"]
    from t5g2convert import verify

    assert verify(tmp_path / "model", small / "parent").passed
    assert json.loads(path.read_text())["sha256"] != before
    assert identity(tmp_path / "model") == before
    path.unlink()
    assert identity(tmp_path / "model") != before


def test_models_with_equal_configs_differ_without_recorded_sha256(small: Path, tmp_path: Path) -> None:
    from t5g2convert import convert

    convert(small / "parent", tmp_path / "model", hashing=False, flush=False)
    before, path = identity(tmp_path / "model"), tmp_path / "model/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert identity(tmp_path / "model") != before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"lr": 5e-3}}, "lr 0.004, now 0.005"),
        ({"settings": {"clip": 2.0}}, "clip 1.0, now 2.0"),
        ({"model": "0" * 64}, "MODEL .*, now 0000"),
        ({"data": "0" * 64}, "DATA .*, now 0000"),
    ],
)
def test_another_run_is_not_resumed_and_the_difference_is_named(
    change: dict[str, Any], message: str, trained: Path, description: dict[str, Any]
) -> None:
    check_same(trained / "run", description)
    settings = {**description["settings"], **change.get("settings", {})}
    with pytest.raises(UsageError, match=message):
        check_same(trained / "run", {**description, **change, "settings": settings})


def test_a_changed_run_json_is_refused(copied: Path, description: dict[str, Any]) -> None:
    (copied / "run.json").write_text(json.dumps({**description, "settings_sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match="does not match the settings"):
        check_same(copied, description)
    (copied / "run.json").unlink()
    with pytest.raises(CheckpointError, match="nothing to resume"):
        check_same(copied, description)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_of_an_earlier_format_is_refused(number: int, copied: Path, description: dict[str, Any]) -> None:
    (copied / "run.json").write_text(json.dumps({**description, "format": number}))
    message = rf"run\.json: has format {number}, expected 3 \(finish this run with the version of t5g2convert that"
    for use in (lambda: check_same(copied, description), lambda: read_history(copied)):
        with pytest.raises(CheckpointError, match=message):
            use()


def test_a_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    check_vacant(tmp_path / "absent")
    check_vacant(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OutputError, match="--resume"):
            check_vacant(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"encoder_length": 513, "batch_tokens": 513},
            UsageError,
            "--encoder-length 513 exceeds the 512 positions",
        ),
        ({"decoder_length": 513}, UsageError, "--decoder-length 513"),
        ({"batch_tokens": 63}, UsageError, "smaller than one sample of 64"),
        ({"freeze_until": 3}, UsageError, "--freeze-until and --trainable must be used together"),
        ({"trainable": ("*",)}, UsageError, "--freeze-until and --trainable must be used together"),
        ({"freeze_until": 4, "trainable": ("*",)}, UsageError, "--freeze-until 4 must be less than --steps 4"),
        ({"image_every": 2, "decoder_length": 40}, DataError, r"2 document\(s\) with images are longer"),
        (
            {"mixture": MANY_SPANS, "encoder_length": 400, "decoder_length": 512, "batch_tokens": 400},
            DataError,
            "is a sentinel",
        ),
    ],
)
def test_settings_that_do_not_fit_model_or_data_are_refused(
    changes: dict[str, Any], error: type[T5g2Error], message: str, small: Path
) -> None:
    prepare(small / "model", small / "data", settings_of())
    with pytest.raises(error, match=message):
        prepare(small / "model", small / "data", settings_of(**changes))


def test_image_steps_without_a_vision_tower_or_images_are_refused(small: Path, tmp_path: Path) -> None:
    from t5g2convert.adaptation.data.documents import read_files
    from t5g2convert.adaptation.data.pack import pack

    text = small / "texts/argparse.txt"
    pack(small / "model", tmp_path / "data", read_files([text], "text", lambda _: None))
    prepare(small / "model", tmp_path / "data", settings_of())
    with pytest.raises(DataError, match="has no documents with images"):
        prepare(small / "model", tmp_path / "data", settings_of(image_every=2))


@pytest.mark.parametrize("at_once", [1, 5, 100])
def test_sizes_of_documents_with_images_are_those_of_their_samples(
    small: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = prepare(small / "model", small / "data", settings_of(image_every=2)).samples
    sizes = [samples.image_size(document) for document in samples.corpora[0].packed.images]
    expected = [
        f"document {number}: {size.encoder} encoder tokens and {size.labels} labels"
        for number, size in enumerate(sizes)
        if size.labels > 40
    ]
    monkeypatch.setattr(samples_of_run, "CHECKED_AT_ONCE", at_once)
    with pytest.raises(DataError) as failed:
        prepare(small / "model", small / "data", settings_of(image_every=2, decoder_length=40))
    assert list(failed.value.details) == expected
    longest = max(size.encoder for size in sizes)
    monkeypatch.setattr(samples_of_run, "SHOWN", 1)
    with pytest.raises(DataError, match=r"\d+ document\(s\) with images are longer than") as failed:
        samples_of_run.measure(with_settings(samples, encoder_length=longest - 1))
    first = next(number for number, size in enumerate(sizes) if size.encoder == longest)
    assert failed.value.details[0].startswith(f"document {first}: {longest} encoder tokens")
    samples_of_run.measure(with_settings(samples, encoder_length=longest))


def with_settings(samples: UL2Dataset, **changes: Any) -> UL2Dataset:
    """Return the same samples with other settings."""
    changed = copy(samples)
    changed.settings = samples.settings.model_copy(update=changes)
    return changed


@pytest.mark.parametrize(
    ("part", "rate"),
    [((), "attention_dropout"), (("encoder", "text_config"), "dropout_rate"), (("decoder",), "dropout_rate")],
)
def test_a_model_with_dropout_is_refused(part: tuple[str, ...], rate: str, small: Path, tmp_path: Path) -> None:
    with_config(small, tmp_path, part, rate, 0.1)
    with pytest.raises(CheckpointError, match=rf"{'.'.join((*part, rate))} is 0.1, expected 0"):
        prepare(tmp_path / "model", small / "data", settings_of())


def test_a_pad_without_a_row_is_not_a_special_token(small: Path, tmp_path: Path) -> None:
    with_config(small, tmp_path, ("decoder",), "pad_token_id", 256)
    shutil.copytree(small / "data", tmp_path / "data")
    index = json.loads((tmp_path / "data/index.json").read_text())
    index["tokens"]["pad"] = 256
    (tmp_path / "data/index.json").write_text(json.dumps(index))
    assert prepare(tmp_path / "model", tmp_path / "data", settings_of()).tokens.pad == 256


def with_config(small: Path, folder: Path, part: tuple[str, ...], name: str, value: object) -> None:
    """Copy the small model to `folder`, with another value in its config."""
    shutil.copytree(small / "model", folder / "model")
    path = folder / "model/config.json"
    config = section = json.loads(path.read_text())
    for key in part:
        section = section[key]
    section[name] = value
    path.write_text(json.dumps(config))


def test_data_of_another_tokenizer_is_refused(small: Path, tmp_path: Path) -> None:
    shutil.copytree(small / "model", tmp_path / "model")
    path = tmp_path / "model/tokenizer.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="was packed with the tokenizer"):
        prepare(tmp_path / "model", small / "data", settings_of())


def test_a_rope_scaling_that_differs_from_the_config_is_refused(small: Path) -> None:
    checkpoint = open_checkpoint(small / "model")
    limits = read_limits(checkpoint.config, checkpoint.path)
    check_rope(limits, None)
    check_rope(limits, "linear:1")
    with pytest.raises(UsageError, match=r"config.json has linear:1 .*t5g2 convert --rope-scaling linear:8"):
        check_rope(limits, "linear:8")
    for unknown in ("yarn:8", "linear", "linear:x", "linear:0"):
        with pytest.raises(UsageError, match="unknown RoPE scaling"):
            check_rope(limits, unknown)


def test_a_teacher_that_does_not_fit_is_refused(small: Path, twin_folder: TwinFolder) -> None:
    check_teacher(small / "parent", vocabulary=256, longest=512)
    check_teacher(twin_folder("images-with-fill"), vocabulary=262_144, longest=100)
    with pytest.raises(CheckpointError, match="a vocabulary of 256"):
        check_teacher(small / "parent", vocabulary=300, longest=10)
    with pytest.raises(CheckpointError, match="reads at most 512 tokens"):
        check_teacher(small / "parent", vocabulary=256, longest=513)
    with pytest.raises(CheckpointError, match="cannot be distilled: expected a Gemma 3"):
        check_teacher(small / "model", vocabulary=256, longest=10)


def test_log_files_of_a_batch_system_may_be_in_the_folder_of_a_run(tmp_path: Path) -> None:
    for name in ("slurm-77.out", "train.err", "train.log"):
        (tmp_path / name).touch()
    check_vacant(tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(OutputError, match="exists and is not an empty folder"):
        check_vacant(tmp_path)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("place", ["prepare_local_plan", "prepare_global_plan", "write_data", "finish"])
def test_a_signal_while_torch_writes_a_checkpoint_ends_the_run(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Torch pickles the errors of all processes, and raises its own error."""

    def stopped(*_: object, **__: object) -> None:
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(HuggingFaceStorageWriter, place, stopped)
    with pytest.raises(Interrupted) as found:
        run(request_of(small, tmp_path / "run", settings_of(steps=1, precision="float32")))
    assert (found.value.exit_code, found.value.message) == (143, "stopped by signal 15")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("limit", [100, 200_000], ids=["in the first file", "in a later one"])
def test_a_full_disk_is_reported_with_the_error_of_the_system(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    opened, written = HashedFiles.create_stream, []

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def write(self, data: Any) -> int:
            if sum(written) + len(data) > limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(len(data))
            return int(self.stream.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    @contextmanager
    def full(self: HashedFiles, path: Any, mode: str) -> Iterator[Any]:
        with opened(self, path, mode) as stream:
            yield Full(stream)

    monkeypatch.setattr(HashedFiles, "create_stream", full)
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 50_000)
    with pytest.raises(OutputError, match=r"step-00000001: cannot be written: No space left on device$"):
        run(request_of(small, tmp_path / "run", settings_of(steps=1, precision="float32")))
    assert len(written) == (0 if limit == 100 else len(list(tmp_path.glob("run/checkpoints/.*/shard-*"))) - 1)
