"""The research model: T5Gemma 2 in one of its forms, and its parent in each where the encoder is hidden."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma3ForCausalLM, PreTrainedModel, T5Gemma2ForConditionalGeneration

from t5g2convert import convert, inspect, plan, verify
from t5g2convert.adaptation.research import ResearchModel, load
from t5g2convert.errors import CheckpointError, MappingError
from tests.conftest import TwinFolder
from tests.reference.models import Batch, padded_batch

MAPS = {
    "untied": (False, "separate", "all"),
    "tied": (True, "separate", "all"),
    "merged": (True, "merged", "all"),
    "full": (True, "merged", "full"),
}
"""The maps of the ablations, and the forms that they make."""

Researched = Callable[[str, str], Path]

ENCODER, DECODER = padded_batch(21, seed=3, eoi=None), padded_batch(17, seed=4, left=0, eoi=None)
"""What the stacks read; both are longer than every window."""


@pytest.fixture(scope="module")
def researched(twin_folder: TwinFolder, tmp_path_factory: pytest.TempPathFactory) -> Researched:
    """The conversion of a twin by one of the maps, by their names, written on first use."""
    root = tmp_path_factory.mktemp("researched")

    def folder(twin: str, name: str) -> Path:
        if not (path := root / f"{twin}-{name}").exists():
            convert(twin_folder(twin), path, mapping=f"ablation-{name}")
        return path

    return folder


def read(model: torch.nn.Module, encoder: Batch, decoder: Batch, *, hidden: bool = False) -> Tensor:
    """Logits of the kept tokens."""
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
@pytest.mark.parametrize("twin", ["text-float32", "text-13"])
@torch.inference_mode()
def test_merged_and_tied_it_computes_what_transformers_computes(
    twin: str, kernel: str, researched: Researched, converted_twin: TwinFolder
) -> None:
    theirs = of_transformers(T5Gemma2ForConditionalGeneration, converted_twin(twin))
    ours = load(researched(twin, "merged"), kernel=kernel)
    for hidden in (False, True):
        expected = read(theirs, ENCODER, DECODER, hidden=hidden)
        assert relative(read(ours, ENCODER, DECODER, hidden=hidden), expected) < 1e-5
    assert relative(read(ours, ENCODER, DECODER), read(ours, ENCODER, DECODER, hidden=True)) > 1e-2


@pytest.mark.parametrize("name", MAPS)
@torch.inference_mode()
def test_with_the_encoder_hidden_each_form_is_its_parent(
    name: str, researched: Researched, twin_folder: TwinFolder
) -> None:
    parent = of_transformers(Gemma3ForCausalLM, twin_folder("text-float32"))
    expected = parent(input_ids=DECODER.ids, attention_mask=DECODER.mask).logits[DECODER.kept]
    model = load(researched("text-float32", name), kernel="eager")
    assert torch.equal(read(model, ENCODER, DECODER, hidden=True), expected)
    assert relative(read(model, ENCODER, DECODER), expected) > 1e-2
    fused = load(researched("text-float32", name))
    assert relative(read(fused, ENCODER, DECODER, hidden=True), expected) < 1e-5


@pytest.mark.parametrize("name", ["untied", "tied"])
@torch.inference_mode()
def test_a_cross_attention_that_adds_nothing_leaves_the_parent(
    name: str, researched: Researched, twin_folder: TwinFolder
) -> None:
    parent = of_transformers(Gemma3ForCausalLM, twin_folder("text-float32"))
    expected = parent(input_ids=DECODER.ids, attention_mask=DECODER.mask).logits[DECODER.kept]
    model = load(researched("text-float32", name), kernel="eager")
    for layer in model.model.decoder.layers:
        # That norm multiplies by 1 + weight.
        layer.post_cross_attn_layernorm.weight.fill_(-1.0)
    assert torch.equal(read(model, ENCODER, DECODER), expected)


@pytest.mark.parametrize("name", MAPS)
def test_the_cross_attention_starts_as_the_self_attention(name: str, researched: Researched) -> None:
    tensors = load_file(researched("text-float32", name) / "model.safetensors")
    started = {key: key.replace("cross_attn", "self_attn") for key in tensors if "cross_attn" in key}
    assert len(started) == (7 * 8 if MAPS[name][1] == "separate" else 0)
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


@pytest.mark.parametrize("name", MAPS)
def test_every_parameter_is_trained_and_computing_twice_changes_nothing(name: str, researched: Researched) -> None:
    gradients = []
    for recomputed in (False, True):
        model = load(researched("text-float32", name))
        if recomputed:
            model.gradient_checkpointing_enable()
        read(model, ENCODER, DECODER).logsumexp(-1).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    assert all(grad is not None and float(grad.abs().max()) > 0 for grad in gradients[0].values())
    assert all(bool(torch.isfinite(grad).all()) for grad in gradients[0].values())
    for key, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], grad)


def test_the_parameters_are_called_as_the_tensors_and_tied_ones_are_one(researched: Researched) -> None:
    for name, (tied, _, _) in MAPS.items():
        folder = researched("text-float32", name)
        model = load(folder)
        assert dict(model.named_parameters()).keys() == load_file(folder / "model.safetensors").keys()
        tables = {id(stack.embed_tokens.weight) for stack in (model.model.encoder, model.model.decoder)}
        assert len(tables) == (1 if tied else 2)
        assert model.lm_head.weight is model.model.decoder.embed_tokens.weight


def test_tying_and_merging_save_what_the_paper_says_that_they_save(researched: Researched) -> None:
    counted = {name: inspect(researched("text-float32", name)).parameters for name in MAPS}
    sizes = {name: json.loads((researched("text-float32", name) / "config.json").read_text()) for name in MAPS}
    for name, form in MAPS.items():
        assert tuple(sizes[name][key] for key in ("tied", "attention", "cross_layers")) == form
    assert counted["untied"]["embedding"] == 2 * counted["tied"]["embedding"]
    assert {part: counted["untied"][part] for part in ("encoder", "decoder")} == {
        part: counted["tied"][part] for part in ("encoder", "decoder")
    }
    assert counted["tied"]["decoder"] > counted["merged"]["decoder"] == counted["merged"]["encoder"]
    assert counted["merged"] == counted["full"]
    assert counted["untied"]["total"] > counted["tied"]["total"] > counted["merged"]["total"]
    assert all(
        sum(parameter.numel() for parameter in load(researched("text-float32", name)).parameters()) == parts["total"]
        for name, parts in counted.items()
    )


def test_a_batch_from_which_some_encoders_are_hidden_is_refused(researched: Researched) -> None:
    some = ENCODER.mask.clone()
    some[0] = 0
    model: ResearchModel = load(researched("text-float32", "tied"))
    with pytest.raises(ValueError, match="hidden, or of none"):
        read(model, Batch(ENCODER.ids, some), DECODER)


def damaged(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("model.decoder.norm.weight"), "has no tensor 'model.decoder.norm.weight'"),
        (lambda tensors: tensors.update(other=torch.zeros(2)), "tensors that its config does not imply: other"),
        (
            lambda tensors: tensors.update({"model.decoder.norm.weight": torch.zeros(2)}),
            "tensor 'model.decoder.norm.weight' has shape [2], its config implies [24]",
        ),
    ],
)
def test_a_folder_with_other_tensors_is_refused(
    change: Callable[[dict[str, Tensor]], object], told: str, researched: Researched, tmp_path: Path
) -> None:
    folder = damaged(researched("text-float32", "merged"), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert told in caught.value.message


@pytest.mark.parametrize("name", MAPS)
def test_verify_never_passes_a_research_model(name: str, researched: Researched, twin_folder: TwinFolder) -> None:
    for source in (None, twin_folder("text-float32")):
        with pytest.raises(CheckpointError, match=r"'t5g2_research' .* is not judged"):
            verify(researched("text-float32", name), source)


@pytest.mark.parametrize("name", MAPS)
def test_a_map_that_forgets_a_row_is_refused(name: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / f"mappings/ablation/{name}.yaml").read_text()
    lines = text.splitlines(keepends=True)
    at = next(number for number, line in enumerate(lines) if "self_attn.k_norm" in line)
    rest = next(number for number in range(at + 1, len(lines)) if lines[number].startswith(("  - from", "  #", "\n")))
    (tmp_path / "mine.yaml").write_text("".join(lines[:at] + lines[rest:]))
    with pytest.raises(CheckpointError, match="8 unused"):
        plan(twin_folder("text-8"), mapping=str(tmp_path / "mine.yaml"))
    (tmp_path / "other.yaml").write_text(text.replace("tied: true", "tied: false", 1))
    if MAPS[name][0]:
        with pytest.raises(MappingError) as caught:
            plan(twin_folder("text-8"), mapping=str(tmp_path / "other.yaml"))
        assert caught.value.details == ("not filled: model.decoder.embed_tokens.weight",)
