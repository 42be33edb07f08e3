from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, T5Gemma2ForConditionalGeneration

from t5g2convert import CheckpointError, UsageError
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.generation.engines import Engine, ReferenceEngine, TransformersEngine
from t5g2convert.reference.t5gemma import T5GemmaReference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder
from tests.models.twins import SIGLIP
from tests.reference.models import (
    IMAGE,
    Batch,
    greedy_tokens,
    loaded,
    padded_batch,
    pixels,
    with_images,
    write_t5gemma2,
)

NAME = "T5Gemma2ForConditionalGeneration"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with images, unequal stacks and windows, and varied greedy output."""
    path = tmp_path_factory.mktemp("lively") / "model"
    write_t5gemma2(
        path, {"num_hidden_layers": 3}, {"sliding_window": 5, "query_pre_attn_scalar": 1}, tower=SIGLIP, table=0.05
    )
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> T5Gemma2Reference:
    return T5Gemma2Reference(open_checkpoint(folder), resident=True)


@pytest.fixture(scope="module")
def fused(folder: Path) -> ReferenceEngine:
    return ReferenceEngine(T5Gemma2Reference(open_checkpoint(folder), resident=True, kernel="sdpa"))


@pytest.fixture(scope="module")
def theirs(folder: Path) -> TransformersEngine:
    return TransformersEngine(folder, NAME, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def inputs() -> Batch:
    return padded_batch(14, seed=1, left=3, right=2)


def stepped(engine: Engine, inputs: Batch | None, decoder: Tensor, images: Tensor | None = None) -> Tensor:
    """Return the logits after a prompt of the decoder and after each of 12 greedy tokens, [B, 13, V]."""
    hidden = inputs is None
    step = engine.start_hidden(len(decoder)) if hidden else engine.start(inputs.ids, inputs.kept, images, room=4)
    with torch.inference_mode():
        logits = [step(decoder)]
        for _ in range(12):
            logits.append(step(logits[-1].argmax(-1)[:, None]))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens_equal_those_of_transformers(
    cached: bool, folder: Path, model: T5Gemma2Reference, inputs: Batch
) -> None:
    expected = loaded(T5Gemma2ForConditionalGeneration, folder).generate(
        input_ids=inputs.ids, attention_mask=inputs.mask, max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    found = greedy_tokens(model, inputs, 32, cached=cached)
    assert found.tolist() == expected[:, 1:].tolist()
    assert all(len(set(row)) > 16 for row in found.tolist())


def test_greedy_tokens_after_images_equal_those_of_transformers(folder: Path, model: T5Gemma2Reference) -> None:
    inputs, count = with_images(padded_batch(21, seed=2), IMAGE)
    images = pixels(count, torch.float32)
    expected = loaded(T5Gemma2ForConditionalGeneration, folder).generate(
        input_ids=inputs.ids,
        attention_mask=inputs.mask,
        pixel_values=images,
        max_new_tokens=32,
        do_sample=False,
        eos_token_id=None,
    )
    found = greedy_tokens(model, inputs, 32, images=images)
    assert found.tolist() == expected[:, 1:].tolist()
    assert found.tolist() != greedy_tokens(model, inputs, 32, images=-images).tolist()


def test_both_engines_compute_the_same(fused: ReferenceEngine, theirs: TransformersEngine, inputs: Batch) -> None:
    decoder = torch.tensor([[2, 9, 40], [2, 8, 41], [2, 7, 42]])
    found, expected = (stepped(engine, inputs, decoder) for engine in (fused, theirs))
    assert found.argmax(-1).tolist() == expected.argmax(-1).tolist()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_both_engines_compute_the_same_with_images(fused: ReferenceEngine, theirs: TransformersEngine) -> None:
    inputs, count = with_images(padded_batch(21, seed=2), IMAGE)
    images, decoder = pixels(count, torch.float32), torch.full((3, 1), 2)
    found, expected = (stepped(engine, inputs, decoder, images) for engine in (fused, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_both_engines_compute_the_same_with_the_encoder_hidden(
    fused: ReferenceEngine, theirs: TransformersEngine, inputs: Batch
) -> None:
    decoder = torch.tensor([[2, 9, 40], [2, 8, 41], [2, 7, 42]])
    found, expected = (stepped(engine, None, decoder) for engine in (fused, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, stepped(fused, inputs, decoder), atol=0.01)


@pytest.mark.parametrize("name", ["text-8", "text-13"])
def test_with_the_encoder_hidden_the_tokens_are_gemma_3s(
    name: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    prompt = torch.randint(3, 280, (3, 9), generator=torch.Generator().manual_seed(5))
    prompt[:, 0] = 2
    gemma = loaded(Gemma3ForCausalLM, twin_folder(name))
    expected = gemma.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False, eos_token_id=None
    )[:, prompt.shape[1] :]
    reference = T5Gemma2Reference(
        open_checkpoint(converted_twin(name)), dtype=torch.float32, resident=True, kernel="sdpa"
    )
    engines: list[Engine] = [
        ReferenceEngine(reference),
        TransformersEngine(converted_twin(name), NAME, dtype=torch.float32, device="cpu"),
    ]
    for engine in engines:
        step, tokens = engine.start_hidden(3, room=49), prompt
        with torch.inference_mode():
            for _ in range(40):
                following = step(tokens if tokens is prompt else tokens[:, -1:]).argmax(-1)[:, None]
                tokens = torch.cat((tokens, following), dim=1)
        assert tokens[:, prompt.shape[1] :].tolist() == expected.tolist()


def test_both_engines_run_the_first_t5gemma(converted_twin: TwinFolder, inputs: Batch) -> None:
    folder = converted_twin("gemma2-float32")
    reference = T5GemmaReference(open_checkpoint(folder), dtype=torch.float32, resident=True, kernel="sdpa")
    engines: list[Engine] = [
        ReferenceEngine(reference),
        TransformersEngine(folder, "T5GemmaForConditionalGeneration", dtype=torch.float32, device="cpu"),
    ]
    found, expected = (stepped(engine, inputs, torch.tensor([[2, 9], [2, 8], [2, 7]])) for engine in engines)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_sequence_gives_the_same_tokens_alone_and_in_a_batch(model: T5Gemma2Reference, inputs: Batch) -> None:
    together = greedy_tokens(model, inputs, 32)
    # Row 1 has padding on the left, which moves its positions.
    for row in (0, 2):
        kept = inputs.kept[row]
        alone = Batch(inputs.ids[row : row + 1, kept], inputs.mask[row : row + 1, kept])
        assert greedy_tokens(model, alone, 32)[0].tolist() == together[row].tolist()


def test_the_start_token_counts(model: T5Gemma2Reference, inputs: Batch) -> None:
    assert greedy_tokens(model, inputs, 1).tolist() != greedy_tokens(model, inputs, 1, start=150).tolist()


def test_a_step_reads_only_the_new_tokens(
    model: T5Gemma2Reference, inputs: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, read, projected = model.decode, [], []
    monkeypatch.setattr(model, "decode", lambda ids, *rest: read.append(ids.shape[1]) or decode(ids, *rest))
    attention = type(model.decoder.layer(0).self_attn)
    project = attention.project_memory
    monkeypatch.setattr(attention, "project_memory", lambda *all_: projected.append(1) or project(*all_))
    greedy_tokens(model, inputs, 5)
    assert read == [1] * 5
    # The keys and values of the memory are computed once in each layer.
    assert len(projected) == len(model.decoder)


def test_the_caches_do_not_grow_within_their_room(
    model: T5Gemma2Reference, inputs: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []
    start = model.decode
    monkeypatch.setattr(model, "decode", lambda *all_: caches.append(all_[-1]) or start(*all_))
    step = ReferenceEngine(model).start(inputs.ids, inputs.kept, room=6)
    places = []
    for _ in range(6):
        step(torch.full((3, 1), 2))
        places.append(caches[-1][0].memory[0].data_ptr())
    assert len(set(places)) == 1


def test_transformers_refuses_a_folder_with_a_missing_tensor(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.decoder.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="does not load in transformers: 1 tensors"):
        TransformersEngine(tmp_path, NAME, dtype=torch.float32, device="cpu")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="does not load in transformers"):
        TransformersEngine(tmp_path, NAME, dtype=torch.float32, device="cpu")


def test_without_transformers_its_engine_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UsageError, match=r"--engine transformers needs transformers.*pip install"):
        TransformersEngine(folder, NAME, dtype=torch.float32, device="cpu")
