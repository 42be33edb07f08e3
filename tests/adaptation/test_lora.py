"""Fine-tuning of a LoRA adapter: its gradient, its resume, the adapter that is written, and refusals."""

import json
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t5g2convert import CheckpointError, OutputError, UsageError, inspect, verify
from t5g2convert.adaptation.adapter_export import export_adapter
from t5g2convert.adaptation.average import average
from t5g2convert.adaptation.finetune_options import FinetuneOptions
from t5g2convert.adaptation.merge import merge
from t5g2convert.adaptation.train import build, model
from t5g2convert.adaptation.train.checkpoint_manifest import checkpoint_path
from t5g2convert.adaptation.train.lora import AdapterStart
from t5g2convert.adaptation.train.lora_shape import TARGETS, LoraShape
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.weights import Weights
from tests.adaptation.adapters import load
from tests.adaptation.finetunings import OPTIONS, finetune_here, finetune_request, finetuned
from tests.adaptation.trainings import steps_of, tensors_of

LORA = ("--lora", "3", "--lora-alpha", "12")
Q = "model.decoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapted(shared: Any, small: Path, pairs: Path) -> Path:
    """A run of 6 steps that trained an adapter, in one process, and its output."""

    def build(folder: Path) -> None:
        done = finetuned(small, pairs, folder / "run", *OPTIONS, *LORA, "--steps", "6", "--save-every", "2", "--json")
        (folder / "output.json").write_text(done.stdout)

    return Path(shared("adapted", build))


def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 43).view(2, 20), "decoder_input_ids": torch.arange(5, 27).view(2, 11)}


def test_the_adapter_is_peft_s_own_and_loads_on_the_model(adapted: Path, small: Path) -> None:
    from peft import PeftModel

    adapter = adapted / "run/adapter"
    assert sorted(path.name for path in adapter.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "t5g2_adapter.json",
    ]
    assert not (adapted / "run/model").exists()
    output = json.loads((adapted / "output.json").read_text())
    assert output["adapter"] == {"output": str(adapter), "targets": 4 * 7}
    assert output["model"] is None
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (3, 12, True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 4 * 7
    assert not any("vision" in name or "projector" in name or "embed" in name for name in tensors)
    peft = PeftModel.from_pretrained(load(small / "model"), str(adapter))
    state = {name: value for name, value in peft.state_dict().items() if "lora_" in name}
    assert {name.replace(".default", "") for name in state} == tensors.keys()
    for name, value in state.items():
        assert torch.equal(value, tensors[name.replace(".default", "")])
    assert all(tensors[name].any() for name in tensors), "all were trained"


def test_the_merged_model_computes_what_model_and_adapter_compute(adapted: Path, small: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    adapter = adapted / "run/adapter"
    merge(small / "model", adapter, tmp_path / "merged", dtype="float32")
    assert verify(tmp_path / "merged", small / "model", adapter=adapter, record=False).passed
    with torch.no_grad():
        base = load(small / "model")
        alone = base(**batch()).logits
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()(**batch()).logits
        ours = load(tmp_path / "merged")(**batch()).logits
    assert float((theirs - alone).abs().max()) > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_steps_are_those_of_peft_and_torch(adapted: Path, small: Path, pairs: Path, one_process: None) -> None:
    """Repeat the steps of the run with peft, torch's AdamW and the same batches."""
    from peft import PeftModel
    from torch.nn.functional import cross_entropy

    from t5g2convert.adaptation.finetune import prepare
    from t5g2convert.adaptation.train.loss import PIXELS
    from t5g2convert.adaptation.train.schedule import learning_rate

    request = finetune_request(small, pairs, adapted / "none", steps=6, lora=3, lora_alpha=12.0)
    prepared = prepare(request)
    model = PeftModel.from_pretrained(load(small / "model"), str(adapted / "run/adapter"), is_trainable=True).train()
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = {name.removeprefix("base_model.model.").replace(".default", ""): each for name, each in names.items()}
    start = AdapterStart(Weights(open_checkpoint(small / "model")), LoraShape(3, 12, TARGETS), seed=0)
    published = {name.replace("encoder.text_model.", "encoder."): each for name, each in first.items()}
    for name, parameter in published.items():
        parameter.data = start.rows(name, 0, len(parameter)).clone()
    settings = prepared.samples.settings
    optimizer = torch.optim.AdamW(
        published.values(), lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.0
    )
    losses, total, count = [], torch.zeros(()), 0
    for place in prepared.samples.order(request.options, rank=0, world=1):
        one = prepared.samples[place]
        pixels = {PIXELS: one[PIXELS]} if PIXELS in one else {}
        keys = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
        logits, labels = model(**{key: one[key] for key in keys}, **pixels).logits, one["labels"]
        total = total + cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count += int((labels >= 0).sum())
        if not place.is_last:
            continue
        loss = total / count
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_(list(published.values()), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, place.step)
        optimizer.step()
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0
    logged = [step["loss"] for step in steps_of(adapted / "run")]
    assert logged == pytest.approx(losses, rel=1e-5)
    for name, value in tensors_of(adapted / "run", 6).items():
        torch.testing.assert_close(published[name].detach(), value, rtol=1e-3, atol=2e-5)


def test_only_matrices_are_trained_and_saved(adapted: Path, small: Path) -> None:
    tensors = tensors_of(adapted / "run", 6)
    assert len(tensors) == 2 * 4 * 7
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    settings = json.loads((adapted / "run/run.json").read_text())["settings"]
    assert (settings["lora"], settings["lora_alpha"], settings["lora_targets"]) == (3, 12.0, list(TARGETS))


def test_an_adapter_starts_at_zero_and_its_start_is_a_function_of_the_seed(small: Path) -> None:
    weights, shape = Weights(open_checkpoint(small / "model")), LoraShape(5, 10.0, TARGETS)
    one, other = (AdapterStart(weights, shape, seed=seed) for seed in (1, 2))
    whole = one.rows(f"{Q}.lora_A.weight", 0, 5)
    columns = whole.shape[1]
    assert torch.equal(whole, torch.cat([one.rows(f"{Q}.lora_A.weight", at, at + 1) for at in range(5)]))
    assert float(whole.abs().max()) <= columns**-0.5
    assert float(whole.std()) == pytest.approx((columns / 1.0) ** -0.5 / 3**0.5, rel=0.15)
    assert not torch.equal(whole, other.rows(f"{Q}.lora_A.weight", 0, 5))
    assert not torch.equal(whole, one.rows(f"{Q.replace('q_proj', 'k_proj')}.lora_A.weight", 0, 5))
    assert not one.rows(f"{Q}.lora_B.weight", 2, 9).any()


def test_a_run_in_bfloat16_with_recomputation_and_parts_trains(
    small: Path, pairs: Path, tmp_path: Path, one_process: None
) -> None:
    options: dict[str, Any] = {"lora": 2, "lora_targets": ("q_proj", "down_proj"), "lr_decoder": 1e-5}
    how: dict[str, Any] = {"precision": "bfloat16", "recompute": "full", "export": True, "steps": 3}
    outcome, steps = finetune_here(finetune_request(small, pairs, tmp_path / "run", **options, **how))
    assert outcome.adapter is not None
    assert outcome.adapter.targets == 2 * 4
    assert len(steps) == 3
    tensors = tensors_of(tmp_path / "run", 3)
    assert {name.split(".")[-3] for name in tensors} == {"q_proj", "down_proj"}
    moved = {
        stack: max(float(t.abs().max()) for n, t in tensors.items() if stack in n and "_B" in n)
        for stack in ("encoder", "decoder")
    }
    assert moved["encoder"] > 50 * moved["decoder"] > 0


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_train_an_adapter_alike(
    small: Path, pairs: Path, tmp_path: Path, one_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_layers(network: torch.nn.Module) -> None:
        compiled.extend(name for name, _ in network.named_modules() if name.endswith("lora_A.default"))
        model.compile_layers(network, backend="aot_eager")

    monkeypatch.setattr(build, "model", SimpleNamespace(**{**vars(model), "compile_layers": compile_layers}))
    for name in ("plain", "compiled"):
        request = finetune_request(small, pairs, tmp_path / name, lora=2, steps=2, compile=name == "compiled")
        finetune_here(request)
    # Before the layers are compiled they have the adapter.
    assert len(compiled) == 4 * 7
    ours, theirs = (tensors_of(tmp_path / name, 2) for name in ("compiled", "plain"))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-5)


def test_an_adapter_is_distilled_too(small: Path, pairs: Path, tmp_path: Path, one_process: None) -> None:
    request = finetune_request(small, pairs, tmp_path / "run", lora=2, kd=small / "parent", steps=2)
    outcome, steps = finetune_here(request)
    assert outcome.trained == sum(tensor.numel() for tensor in tensors_of(tmp_path / "run", 2).values())
    # The teacher is the parent of the model, so it predicts almost the same.
    plain, other = finetune_here(finetune_request(small, pairs, tmp_path / "plain", lora=2, steps=2))
    assert plain.trained == outcome.trained
    assert 0 < steps[0].loss < other[0].loss


def test_a_dry_run_estimates_the_memory_of_an_adapter(adapted: Path, small: Path, pairs: Path, tmp_path: Path) -> None:
    done = finetuned(small, pairs, tmp_path / "run", *OPTIONS, *LORA, "--steps", "6", "--dry-run", "--json")
    found = json.loads(done.stdout)
    trained = sum(tensor.numel() for tensor in tensors_of(adapted / "run", 6).values())
    total = inspect(small / "model").parameters["total"]
    assert found["memory"]["states"] == 16 * trained + 4 * total
    assert found["throughput"] is found["operations"] is None
    assert json.loads((adapted / "output.json").read_text())["trained_parameters"] == trained
    shown = finetuned(small, pairs, tmp_path / "run", *OPTIONS, *LORA, "--steps", "6", "--dry-run")
    assert "weights, gradients and moments" in shown.stdout


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "the tower's layers": (
        {"lora": 2, "lora_targets": ("q_proj", "out_proj")},
        "--lora-targets out_proj: not a linear",
    ),
    "a pattern": ({"lora": 2, "lora_targets": (".*q_proj",)}, "not a linear layer of the text stacks"),
    "the softmax": ({"lora": 2, "lora_targets": ("lm_head",)}, "--lora-targets lm_head"),
    "a name twice": ({"lora": 2, "lora_targets": ("q_proj", "q_proj")}, "expected different names"),
    "no names": ({"lora": 2, "lora_targets": ()}, "expected different names"),
    "alpha without a rank": ({"lora_alpha": 4.0}, "need --lora"),
    "targets without a rank": ({"lora_targets": ("q_proj",)}, "need --lora"),
    "a rank of 0": ({"lora": 0}, "lora"),
    "a rate for the projector": ({"lora": 2, "lr_projector": 1e-3}, "leaves the projector frozen"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_an_adapter_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message):
        FinetuneOptions(lr=1e-3, steps=4, **changes)


def test_an_adapter_is_not_averaged_and_its_settings_may_not_change(
    adapted: Path, small: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="trained a LoRA adapter"):
        average(adapted / "run", tmp_path / "out", last=2)
    shutil.copytree(adapted / "run", tmp_path / "run")
    for change in (("--lora", "4"), ("--lora", "3", "--lora-alpha", "6"), ()):
        done = finetuned(
            small, pairs, tmp_path / "run", *OPTIONS, *change, "--steps", "6", "--resume", "--change", code=2
        )
        assert "cannot be resumed with these options: lora" in done.stderr


def test_an_adapter_names_its_model_and_is_merged_into_no_other(adapted: Path, small: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(small / "model", other)
    (other / "t5g2.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not the model that .*adapter was trained on"):
        merge(other, adapted / "run/adapter", tmp_path / "merged")
    done = merge(small / "model", adapted / "run/adapter", tmp_path / "merged")
    assert not any("not checked" in note for note in done.conversion.notes)


def test_an_export_is_made_once_and_only_replaces_its_own(adapted: Path, small: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted / "run", run)
    assert export_adapter(run, checkpoint_path(run, 6), small / "model").before
    before = {path.name: path.read_bytes() for path in (run / "adapter").iterdir()}
    earlier = export_adapter(run, checkpoint_path(run, 4), small / "model")
    assert not earlier.before
    assert (run / "adapter/adapter_model.safetensors").read_bytes() != before["adapter_model.safetensors"]
    export_adapter(run, checkpoint_path(run, 6), small / "model")
    assert {path.name: path.read_bytes() for path in (run / "adapter").iterdir()} == before
    (run / "adapter/README.md").write_text("mine")
    with pytest.raises(OutputError, match=r"README\.md"):
        export_adapter(run, checkpoint_path(run, 4), small / "model")
    assert (run / "adapter/README.md").read_text() == "mine"


def test_a_run_that_goes_back_sets_its_adapter_aside(
    adapted: Path, small: Path, pairs: Path, tmp_path: Path, one_process: None
) -> None:
    run = tmp_path / "run"
    shutil.copytree(adapted / "run", run)
    before = (run / "adapter/adapter_model.safetensors").read_bytes()
    changes: dict[str, Any] = {"lora": 3, "lora_alpha": 12.0, "steps": 6, "save_every": 2, "export": True}
    request = finetune_request(small, pairs, run, resume=True, from_step=2, change=True, **{**changes, "lr": 1e-3})
    outcome, _ = finetune_here(request)
    assert outcome.start == 2
    assert (run / "adapter.abandoned/adapter_model.safetensors").read_bytes() == before
    assert (run / "adapter/adapter_model.safetensors").read_bytes() != before


@pytest.mark.slow
def test_killed_and_resumed_on_one_two_and_one_processes_equals_one_process(
    adapted: Path, small: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill in step 4 of one process, resume on two and kill in step 6, and finish on one."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (
        *OPTIONS,
        *LORA,
        "--steps",
        "8",
        "--save-every",
        "2",
        "--keep",
        "9",
        "--eval-pairs",
        "5",
        "--eval-every",
        "4",
    )
    finetuned(small, pairs, whole, *options)
    monkeypatch.setenv("KILLED_IN", "step")
    for at, processes, resume in (("4", "1", ()), ("6", "2", ("--resume",))):
        monkeypatch.setenv("KILLED_AT", at)
        more = ("--devices", processes, *resume)
        finetuned(small, pairs, run, *options, *more, code=-signal.SIGKILL, module="tests.adaptation.killed")
    done = finetuned(small, pairs, run, *options, "--resume")
    assert "resuming after 4 steps" in done.stderr
    for step in (2, 4, 8):
        ours, theirs = tensors_of(run, step), tensors_of(whole, step)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if step == 2:
                assert torch.equal(value, theirs[name])
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-5)
    one, other = (json.loads((each / "adapter/t5g2_adapter.json").read_text()) for each in (run, whole))
    assert {**one, "files": 0} == {**other, "files": 0}
    assert [step["labels"] for step in steps_of(run)] == [step["labels"] for step in steps_of(whole)]


@pytest.mark.slow
def test_killed_and_resumed_on_as_many_processes_equals_bit_for_bit(
    small: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (*OPTIONS, *LORA, "--steps", "6", "--save-every", "2", "--eval-pairs", "5", "--eval-every", "3")
    options = (*options, "--generate-eval", "--devices", "2")
    finetuned(small, pairs, whole, *options)
    monkeypatch.setenv("KILLED_IN", "files")
    monkeypatch.setenv("KILLED_AT", "4")
    finetuned(small, pairs, run, *options, code=-signal.SIGKILL, module="tests.adaptation.killed")
    done = finetuned(small, pairs, run, *options, "--resume")
    assert f"adapter     {run / 'adapter'}, 28 targets, loads in peft" in done.stdout
    assert f"t5g2 merge MODEL {run / 'adapter'} OUTPUT makes a model of it" in done.stdout
    assert steps_of(run) == steps_of(whole)
    names = "evaluation.jsonl", "adapter/adapter_model.safetensors", "adapter/t5g2_adapter.json"
    for name in names:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert "generated" in (run / "evaluation.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("groups", [(), ("--shard-size", "1")])
def test_a_rank_smaller_than_the_number_of_processes_is_sharded(
    groups: tuple[str, ...], small: Path, pairs: Path, tmp_path: Path
) -> None:
    options = (*OPTIONS, "--lora", "1", "--steps", "2", "--no-export")
    finetuned(small, pairs, tmp_path / "one", *options)
    finetuned(small, pairs, tmp_path / "two", *options, "--devices", "2", *groups)
    ours, theirs = tensors_of(tmp_path / "two", 2), tensors_of(tmp_path / "one", 2)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-5)
