"""Gemma 2 and T5Gemma compute the same as transformers with eager attention, bit for bit, in two dtypes."""

import itertools
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2ForCausalLM, T5GemmaConfig, T5GemmaForConditionalGeneration

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.t5gemma import T5GemmaReference
from tests.conftest import TwinFolder
from tests.models.twins import BY_NAME, GEMMA2_TWINS
from tests.reference.models import Batch, difference, greedy_tokens, padded_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = [twin.name for twin in GEMMA2_TWINS]
STACK: Mapping[str, Any] = {
    key: value for key, value in BY_NAME["gemma2-5"].text.items() if key != "tie_word_embeddings"
}


@dataclass(frozen=True)
class Case:
    """A model loaded by transformers and by the reference, and the input of both."""

    theirs: Any
    ours: Any
    inputs: Batch
    encoder_inputs: Batch


def loaded(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    model, loading = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    assert not any(loading.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def batches() -> tuple[Batch, Batch]:
    return padded_batch(23, seed=1, eoi=None), padded_batch(17, seed=2, left=3, right=2, eoi=None)


@pytest.fixture(scope="module", params=itertools.product(NAMES, DTYPES), ids="-".join)
def case(request: pytest.FixtureRequest, converted_twin: TwinFolder) -> Case:
    """Return a conversion of every twin in each dtype."""
    name, dtype = request.param[0], DTYPES[request.param[1]]
    folder = converted_twin(name)
    theirs = loaded(T5GemmaForConditionalGeneration, folder, dtype)
    return Case(theirs, T5GemmaReference(open_checkpoint(folder), dtype=dtype), *batches())


def their_logits(case: Case) -> Tensor:
    return case.theirs(  # type: ignore[no-any-return]
        input_ids=case.encoder_inputs.ids,
        attention_mask=case.encoder_inputs.mask,
        decoder_input_ids=case.inputs.ids,
        decoder_attention_mask=case.inputs.mask,
    ).logits


def our_logits(case: Case) -> Tensor:
    memory = case.ours.encode(case.encoder_inputs.ids, case.encoder_inputs.kept)
    states = case.ours.decode(case.inputs.ids, case.inputs.kept, memory, case.encoder_inputs.kept)
    return case.ours.decoder.logits(states)  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_gemma_2_logits(name: str, dtype: torch.dtype, twin_folder: TwinFolder) -> None:
    theirs = loaded(Gemma2ForCausalLM, twin_folder(name), dtype)
    ours = Gemma2Reference(open_checkpoint(twin_folder(name)), dtype=dtype)
    inputs, _ = batches()
    expected = theirs(input_ids=inputs.ids, attention_mask=inputs.mask).logits
    assert difference(ours.logits(inputs.ids, inputs.kept)[inputs.kept], expected[inputs.kept]) == 0


@torch.no_grad()
def test_encoder_states(case: Case) -> None:
    ids, mask, kept = case.encoder_inputs.ids, case.encoder_inputs.mask, case.encoder_inputs.kept
    expected = case.theirs.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert difference(case.ours.encode(ids, kept)[kept], expected[kept]) == 0


@torch.no_grad()
def test_decoder_logits(case: Case) -> None:
    kept = case.inputs.kept
    assert difference(our_logits(case)[kept], their_logits(case)[kept]) == 0


@torch.no_grad()
def test_a_decoder_without_memory_equals_one_with_zero_cross_attention(case: Case) -> None:
    run = case.ours.start_decoder(case.inputs.ids, case.inputs.kept, None, None)
    found, kept = case.ours.decoder.logits(run.through(case.ours.decoder)), case.inputs.kept
    norms = [layer.post_cross_attn_layernorm.weight for layer in case.theirs.model.decoder.layers]
    before = [weight.clone() for weight in norms]
    try:
        # transformers' norm multiplies by 1 + weight.
        for weight in norms:
            weight.fill_(-1)
        expected = their_logits(case)
    finally:
        for weight, value in zip(norms, before, strict=True):
            weight.copy_(value)
    assert difference(found[kept], expected[kept]) == 0
    assert not torch.equal(our_logits(case)[kept], expected[kept])


@pytest.mark.sampled
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_greedy_tokens_with_and_without_cache(name: str, converted_twin: TwinFolder) -> None:
    theirs = loaded(T5GemmaForConditionalGeneration, converted_twin(name), torch.float32)
    ours = T5GemmaReference(open_checkpoint(converted_twin(name)), dtype=torch.float32, resident=True)
    _, inputs = batches()
    expected = theirs.generate(
        input_ids=inputs.ids, attention_mask=inputs.mask, max_new_tokens=32, do_sample=False, eos_token_id=None
    )[:, 1:]
    assert expected.shape == (3, 32)
    for cached in (True, False):
        assert greedy_tokens(ours, inputs, 32, cached=cached).tolist() == expected.tolist()


@torch.no_grad()
def test_decoder_states_are_the_same_from_a_cache_filled_in_pieces(converted_twin: TwinFolder) -> None:
    model = T5GemmaReference(open_checkpoint(converted_twin("gemma2-float32")), resident=True)
    inputs, encoder_inputs = batches()
    memory = model.encode(encoder_inputs.ids, encoder_inputs.kept)
    whole = model.decode(inputs.ids, inputs.kept, memory, encoder_inputs.kept)
    caches = [LayerCache() for _ in range(len(model.decoder))]
    pieces, done = [], 0
    for length in (9, 1, 1, 5, 7):
        ids, kept = inputs.ids[:, done : done + length], inputs.kept[:, : done + length]
        # Only the first call needs the memory; its cached keys and values are not computed again.
        given = memory if done == 0 else torch.full_like(memory, torch.nan)
        pieces.append(model.decode(ids, kept, given, encoder_inputs.kept, caches))
        done += length
    assert done == inputs.ids.shape[1]
    assert difference(torch.cat(pieces, dim=1)[inputs.kept], whole[inputs.kept]) <= 1e-5


@torch.no_grad()
def test_the_fused_kernel_computes_the_same_where_no_softcap_forbids_it(converted_twin: TwinFolder) -> None:
    results = []
    for kernel in ("eager", "sdpa"):
        model = T5GemmaReference(
            open_checkpoint(converted_twin("gemma2-sharded")),
            dtype=torch.float32,
            kernel=kernel,  # type: ignore[arg-type]
        )
        results.append(our_logits(Case(None, model, *batches()))[batches()[0].kept])
        assert model.decoder.layer(0).cross_attn.fused == (kernel == "sdpa")
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_encoder_may_be_wider_and_deeper_than_its_decoder(tmp_path: Path) -> None:
    encoder = {**STACK, "hidden_size": 32, "num_hidden_layers": 7, "head_dim": 6, "num_key_value_heads": 2}
    config = T5GemmaConfig(encoder=deepcopy(encoder), decoder=deepcopy(dict(STACK)), vocab_size=300)
    model = T5GemmaForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.25, generator=generator)
    model.save_pretrained(tmp_path)
    case = Case(
        loaded(T5GemmaForConditionalGeneration, tmp_path, torch.float32),
        T5GemmaReference(open_checkpoint(tmp_path)),
        *batches(),
    )
    kept = case.inputs.kept
    assert difference(our_logits(case)[kept], their_logits(case)[kept]) == 0
