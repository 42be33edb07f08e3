"""The research models of examples/ablation: T5Gemma 2 in its variants, and their parent with the encoder hidden."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ablation.config import MODEL_TYPE, read_research, research_tensors
from ablation.evaluation import evaluate
from ablation.model import ResearchModel, load, register
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, PreTrainedModel, T5Gemma2ForConditionalGeneration

from t5g2convert import convert, inspect, plan, verify
from t5g2convert.adaptation.adapt import Request, adapt
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.train.evaluation import hide_encoder
from t5g2convert.adaptation.train.evaluation_log import Evaluation
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.adaptation.train.model import MODEL_BUILDERS
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.mixture import read_mixture
from t5g2convert.checkpoint.families.registry import TARGETS
from t5g2convert.cli.demo import build_demo_source
from t5g2convert.errors import CheckpointError, MappingError, UsageError
from tests.adaptation.trainings import write_text
from tests.conftest import TwinFolder
from tests.reference.models import Batch, padded_batch

MAPS = Path(__file__).parents[2] / "examples/ablation/maps"

VARIANTS = {
    "untied": (False, "separate", "all"),
    "tied": (True, "separate", "all"),
    "merged": (True, "merged", "all"),
    "full": (True, "merged", "full"),
}
"""The maps, and the variants that they make."""

TEXT = "text-float32"

Researched = Callable[[str, str], Path]

ENCODER, DECODER = padded_batch(21, seed=3, eoi=None), padded_batch(17, seed=4, left=0, eoi=None)
"""What the stacks read; both are longer than every window."""


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Unregister the family for other tests."""
    register()
    yield
    del TARGETS[MODEL_TYPE], MODEL_BUILDERS[MODEL_TYPE]


@pytest.fixture(scope="module")
def researched(twin_folder: TwinFolder, tmp_path_factory: pytest.TempPathFactory) -> Researched:
    """Return the conversion of a twin by a map, both by name, written on first use."""
    root = tmp_path_factory.mktemp("researched")

    def folder(twin: str, name: str) -> Path:
        if not (path := root / f"{twin}-{name}").exists():
            convert(twin_folder(twin), path, mapping=str(MAPS / f"{name}.yaml"))
        return path

    return folder


def read(model: torch.nn.Module, encoder: Batch, decoder: Batch, *, hidden: bool = False) -> Tensor:
    """Return the logits of the kept tokens."""
    mask = torch.zeros_like(encoder.mask) if hidden else encoder.mask
    states = model.model(
        input_ids=encoder.ids,
        attention_mask=mask,
        decoder_input_ids=decoder.ids,
        decoder_attention_mask=decoder.mask,
    ).last_hidden_state
    return model.lm_head(states)[decoder.kept]


def of_transformers(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@torch.inference_mode()
def test_merged_and_tied_it_computes_the_same_as_transformers(
    kernel: str, researched: Researched, converted_twin: TwinFolder
) -> None:
    theirs = of_transformers(T5Gemma2ForConditionalGeneration, converted_twin(TEXT))
    ours = load(researched(TEXT, "merged"), kernel=kernel)
    for hidden in (False, True):
        expected = read(theirs, ENCODER, DECODER, hidden=hidden)
        assert relative(read(ours, ENCODER, DECODER, hidden=hidden), expected) < 1e-5
    assert relative(read(ours, ENCODER, DECODER), read(ours, ENCODER, DECODER, hidden=True)) > 1e-2


@pytest.mark.parametrize("name", VARIANTS)
@torch.inference_mode()
def test_with_the_encoder_hidden_each_form_is_its_parent(
    name: str, researched: Researched, twin_folder: TwinFolder
) -> None:
    parent = of_transformers(Gemma3ForCausalLM, twin_folder(TEXT))
    expected = parent(input_ids=DECODER.ids, attention_mask=DECODER.mask).logits[DECODER.kept]
    model = load(researched(TEXT, name), kernel="eager")
    assert torch.equal(read(model, ENCODER, DECODER, hidden=True), expected)
    assert relative(read(model, ENCODER, DECODER), expected) > 1e-2


@torch.inference_mode()
def test_a_cross_attention_that_adds_nothing_leaves_the_parent(researched: Researched, twin_folder: TwinFolder) -> None:
    parent = of_transformers(Gemma3ForCausalLM, twin_folder(TEXT))
    expected = parent(input_ids=DECODER.ids, attention_mask=DECODER.mask).logits[DECODER.kept]
    model = load(researched(TEXT, "untied"), kernel="eager")
    for layer in model.model.decoder.layers:
        # That norm multiplies by 1 + weight.
        layer.post_cross_attn_layernorm.weight.fill_(-1.0)
    assert torch.equal(read(model, ENCODER, DECODER), expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_cross_attention_starts_as_the_self_attention(name: str, researched: Researched) -> None:
    tensors = load_file(researched(TEXT, name) / "model.safetensors")
    started = {key: key.replace("cross_attn", "self_attn") for key in tensors if "cross_attn" in key}
    assert len(started) == (7 * 8 if VARIANTS[name][1] == "separate" else 0)
    assert all(torch.equal(tensors[one], tensors[other]) for one, other in started.items())


@pytest.mark.parametrize("name", ["merged", "full"])
@torch.inference_mode()
def test_only_the_layers_that_read_the_encoder_depend_on_it(name: str, researched: Researched) -> None:
    model = load(researched("text-8", name), kernel="eager")
    kinds, states = model.model.decoder.settings.layer_types, []
    for layer in model.model.decoder.layers:
        layer.register_forward_hook(lambda _, __, output: states.append(output))
    read(model, ENCODER, DECODER)
    read(model, ENCODER, DECODER, hidden=True)
    changed = [not torch.equal(*pair) for pair in zip(states[: len(kinds)], states[len(kinds) :], strict=True)]
    first = kinds.index("full_attention") if name == "full" else 0
    assert kinds[5] == "full_attention"
    assert changed == [number >= first for number in range(len(kinds))]


@pytest.mark.parametrize("name", ["untied", "full"])
def test_every_parameter_is_trained_and_computing_twice_changes_nothing(name: str, researched: Researched) -> None:
    gradients = []
    for recomputed in (False, True):
        model = load(researched(TEXT, name))
        if recomputed:
            model.gradient_checkpointing_enable()
        read(model, ENCODER, DECODER).logsumexp(-1).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in gradients[0].values())
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients[0].values())
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad)


def test_the_parameters_are_called_as_the_tensors_and_tied_ones_are_one(researched: Researched) -> None:
    for name, (tied, _, _) in VARIANTS.items():
        folder = researched(TEXT, name)
        model = load(folder)
        assert dict(model.named_parameters()).keys() == load_file(folder / "model.safetensors").keys()
        tables = {id(stack.embed_tokens.weight) for stack in (model.model.encoder, model.model.decoder)}
        assert len(tables) == (1 if tied else 2)
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_tying_and_merging_save_as_much_as_the_paper_says(researched: Researched) -> None:
    counted = {name: inspect(researched(TEXT, name)).parameters for name in VARIANTS}
    sizes = {name: json.loads((researched(TEXT, name) / "config.json").read_text()) for name in VARIANTS}
    for name, form in VARIANTS.items():
        assert tuple(sizes[name][key] for key in ("tied", "attention", "cross_layers")) == form
    assert counted["untied"]["embedding"] == 2 * counted["tied"]["embedding"]
    assert {part: counted["untied"][part] for part in ("encoder", "decoder")} == {
        part: counted["tied"][part] for part in ("encoder", "decoder")
    }
    assert counted["tied"]["decoder"] > counted["merged"]["decoder"] == counted["merged"]["encoder"]
    assert counted["merged"] == counted["full"]
    assert counted["untied"]["total"] > counted["tied"]["total"] > counted["merged"]["total"]
    assert all(
        sum(parameter.numel() for parameter in load(researched(TEXT, name)).parameters()) == parts["total"]
        for name, parts in counted.items()
    )


def test_a_batch_from_which_some_encoders_are_hidden_is_refused(researched: Researched) -> None:
    some = ENCODER.mask.clone()
    some[0] = 0
    model: ResearchModel = load(researched(TEXT, "tied"))
    with pytest.raises(ValueError, match="hidden from all samples of a batch"):
        read(model, Batch(ENCODER.ids, some), DECODER)


def damaged(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("model.decoder.norm.weight"), "model.decoder.norm.weight: expected one tensor"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "other: matches no parameter"),
        (
            lambda tensors: tensors.update({"model.decoder.norm.weight": torch.zeros(2)}),
            "model.decoder.norm.weight is (24,), model.decoder.norm.weight is (2,)",
        ),
    ],
)
def test_a_folder_with_other_tensors_is_refused(
    change: Callable[[dict[str, Tensor]], object], message: str, researched: Researched, tmp_path: Path
) -> None:
    folder = damaged(researched(TEXT, "merged"), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert message in caught.value.message


def test_verify_never_passes_a_research_model(researched: Researched, twin_folder: TwinFolder) -> None:
    for source in (None, twin_folder(TEXT)):
        report = verify(researched(TEXT, "merged"), source, record=False)
        assert not report.passed


@pytest.mark.parametrize("name", ["untied", "merged"])
def test_a_map_that_forgets_a_row_is_refused(name: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    text = (MAPS / f"{name}.yaml").read_text()
    lines = text.splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if "self_attn.k_norm" in line)
    rest = next(number for number in range(at + 1, len(lines)) if lines[number].startswith(("  - from", "  #", "\n")))
    (tmp_path / "mine.yaml").write_text("".join(lines[:at] + lines[rest:]))
    with pytest.raises(CheckpointError, match="8 unused"):
        plan(twin_folder("text-8"), mapping=str(tmp_path / "mine.yaml"))
    (tmp_path / "other.yaml").write_text(text.replace("tied: true", "tied: false", 1))
    if VARIANTS[name][0]:
        with pytest.raises(MappingError) as caught:
            plan(twin_folder("text-8"), mapping=str(tmp_path / "other.yaml"))
        assert caught.value.details == ("not filled: model.decoder.embed_tokens.weight",)


# The config


Config = dict[str, Any]

WHERE = Path("somewhere/config.json")

STACK: Config = {
    "vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
}  # fmt: skip
SLIDING = {**STACK, "layer_types": ["sliding_attention"] * 3}


def config(encoder: Config | None = None, decoder: Config | None = None, **top: Any) -> Config:
    return {
        "model_type": MODEL_TYPE, "tied": True, "attention": "merged", "cross_layers": "all",
        "encoder": {**STACK, **(encoder or {})}, "decoder": {**STACK, **(decoder or {})}, **top,
    }  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("attention", ["merged", "separate"])
@pytest.mark.parametrize("layers", ["all", "full"])
def test_the_tensors_are_the_parameters_of_the_model(tied: bool, attention: str, layers: str) -> None:
    other = {"num_hidden_layers": 2, "layer_types": STACK["layer_types"][:2], "head_dim": 6}
    document = config(other, tied=tied, attention=attention, cross_layers=layers)
    model = ResearchModel(read_research(document, WHERE))
    theirs = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = list(research_tensors(document, WHERE))
    assert len(ours) == len(theirs)
    assert {item.name: item.shape for item in ours} == theirs
    parts = {item.name: item.part for item in ours}
    assert all(parts[name] == ("embedding" if "embed" in name else name.split(".")[1]) for name in parts)
    crossed = {0, 1, 2} if layers == "all" else {1}
    assert {int(name.split(".")[3]) for name in parts if "cross_attn" in name} == (
        crossed if attention == "separate" else set()
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"model_type": "t5gemma2"},
            "model_type 't5gemma2' (T5Gemma 2, an encoder-decoder already) is not a research model",
        ),
        (config(attention="both"), "attention: Input should be 'merged' or 'separate'"),
        (config(cross_layers="some"), "cross_layers: Input should be 'all' or 'full'"),
        (config(tied=1), "tied: Input should be a valid boolean"),
        (config(encoder={"hidden_size": 20}), "decoder.hidden_size is 24, expected the encoder's 20"),
        (config(decoder={"vocab_size": 20}), "decoder.vocab_size is 20, expected the encoder's 300"),
        (config(decoder={"num_hidden_layers": 4}), "decoder.layer_types lists 3 layers, num_hidden_layers is 4"),
        (config(decoder=SLIDING, cross_layers="full"), "has no full_attention: no layer attends to the encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_config_is_refused_in_one_line(document: Config, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_research(document, WHERE)
    assert message in caught.value.message
    assert caught.value.where == str(WHERE)


def test_sliding_layers_alone_may_read_the_encoder_where_all_layers_do() -> None:
    model = read_research(config(decoder=SLIDING), WHERE)
    assert [model.reads_encoder(layer) for layer in range(3)] == [True] * 3


# The evaluation


SAMPLES = 16

SETTINGS = Settings(
    mixture=read_mixture(), encoder_length=64, decoder_length=64, batch_tokens=512, steps=4, lr=4e-3, warmup=1, seed=0,
    precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`Write `model`, a conversion of the demo; `data`, packed for it; `run`, four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("trained")
    build_demo_source(folder / "parent")
    convert(folder / "parent", folder / "model")
    (folder / "texts").mkdir()
    write_text(folder / "texts")
    pack(folder / "model", folder / "data", read_files([folder / "texts"], "text", lambda _: None))
    before = dict(os.environ)
    options = AdaptOptions(**dict(SETTINGS), micro_batch=8, save_every=2, keep=2, recompute="none", export=False)
    request = Request(folder / "model", folder / "data", folder / "run", options)
    adapt(request, begun=lambda _: None, report=lambda _: None)
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def before(trained: Path) -> Evaluation:
    """Return the conversion before its training."""
    return evaluate(trained / "model", trained / "data", SETTINGS, samples=SAMPLES)


def checkpoint(trained: Path, step: int) -> Path:
    return trained / f"run/checkpoints/step-{step:08d}"


def test_the_means_are_over_labels() -> None:
    found = Evaluation(0, {"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 8.0}, {"a": 3, "b": 1})
    assert (found.loss, found.hidden_loss, found.gain) == (1.75, 3.5, 1.75)


@pytest.mark.slow
def test_the_size_of_a_pass_does_not_matter(trained: Path, before: Evaluation) -> None:
    again = evaluate(trained / "model", trained / "data", SETTINGS, samples=SAMPLES, micro=3)
    assert again.labels == before.labels
    assert len(again.labels) == 5
    assert again.tasks == pytest.approx(before.tasks, rel=1e-5)
    assert again.hidden == pytest.approx(before.hidden, rel=1e-5)


def test_a_checkpoint_is_evaluated_in_place_of_its_model(trained: Path, before: Evaluation) -> None:
    losses = [before.loss]
    for step in (2, 4):
        place = checkpoint(trained, step)
        found = evaluate(trained / "model", trained / "data", SETTINGS, samples=SAMPLES, checkpoint=place)
        losses.append(found.loss)
    assert losses == sorted(losses, reverse=True)


def test_hiding_leaves_the_samples_as_they_are(trained: Path) -> None:
    batch = prepare(trained / "model", trained / "data", SETTINGS).samples[MicroBatch(0, (0, 1), (True, True))]
    hidden = hide_encoder(batch)
    assert int(batch["attention_mask"].sum()) > int(hidden["attention_mask"].sum()) == 0
    assert all(torch.equal(hidden[name], batch[name]) for name in batch if name != "attention_mask")


@pytest.mark.parametrize("samples", [0, 4, -8, 8_000_000])
def test_samples_are_whole_blocks_and_never_repeated(samples: int, trained: Path) -> None:
    with pytest.raises(UsageError, match=rf"expected a multiple of 8 up to \d+ held-out samples, got {samples}"):
        evaluate(trained / "model", trained / "data", SETTINGS, samples=samples)


def test_a_checkpoint_of_another_model_is_refused(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained / "model", other)
    tensors = load_file(other / "model.safetensors")
    document = json.loads((other / "config.json").read_text())
    document["decoder"]["num_hidden_layers"] = 1
    document["decoder"]["layer_types"] = document["decoder"]["layer_types"][:1]
    (other / "config.json").write_text(json.dumps(document))
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.decoder.layers.") or name.startswith("model.decoder.layers.0.")
    }
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has 'model.decoder.layers.\d+.\S+' of shape .* not a tensor of"):
        evaluate(other, trained / "data", SETTINGS, samples=SAMPLES, checkpoint=checkpoint(trained, 4))
