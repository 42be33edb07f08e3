"""The reference computes the same as transformers with eager attention, for every twin in two dtypes."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder
from tests.interop.judge import load
from tests.models.twins import BY_NAME, TWINS
from tests.reference.models import Batch, difference, greedy_tokens, padded_batch, pixels, with_images

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.0}
"""bfloat16 rounds the differences in the order of additions away."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAMES = [twin.name for twin in TWINS]
IMAGE_NAMES = [twin.name for twin in TWINS if twin.vision is not None]


def cases(*pairs: tuple[str, str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", pairs, ids="-".join, indirect=True)


every_twin = cases(*itertools.product(NAMES, DTYPES))
every_twin_in_float32 = cases(*itertools.product(NAMES, ["float32"]))
every_image_twin = cases(*itertools.product(IMAGE_NAMES, DTYPES))
two_twins_in_float32 = cases(("text-13", "float32"), ("images-8", "float32"))


@dataclass(frozen=True)
class Case:
    """Return a twin and its conversion, both loaded by transformers and by the reference."""

    dtype: torch.dtype
    their_gemma: Any
    their_t5gemma: Any
    gemma: Callable[..., Gemma3Reference]
    t5gemma: Callable[..., T5Gemma2Reference]
    inputs: Batch
    encoder_inputs: Batch

    @property
    def limit(self) -> float:
        """Return the allowed difference."""
        return LIMITS[self.dtype]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, twin_folder: TwinFolder, converted_twin: TwinFolder) -> Case:
    name, dtype = request.param[0], DTYPES[request.param[1]]
    source, output = twin_folder(name), converted_twin(name)
    their_gemma, their_t5gemma, complaints = load(source, output, dtype)
    assert complaints == []
    eoi = BY_NAME[name].eoi if BY_NAME[name].has_eoi else None
    return Case(
        dtype,
        their_gemma,
        their_t5gemma,
        lambda **options: Gemma3Reference(open_checkpoint(source), dtype=dtype, **options),
        lambda **options: T5Gemma2Reference(open_checkpoint(output), dtype=dtype, **options),
        padded_batch(23, seed=1, eoi=eoi),
        padded_batch(17, seed=2, left=3, right=2, eoi=eoi),
    )


def decoder_logits(model: T5Gemma2Reference, inputs: Batch, memory: Tensor, encoder_inputs: Batch) -> Tensor:
    return model.decoder.logits(model.decode(inputs.ids, inputs.kept, memory, encoder_inputs.kept))


@every_twin
@torch.no_grad()
def test_gemma_3_logits(case: Case) -> None:
    ids, mask, kept = case.inputs.ids, case.inputs.mask, case.inputs.kept
    expected = case.their_gemma(input_ids=ids, attention_mask=mask).logits
    assert difference(case.gemma().logits(ids, kept)[kept], expected[kept]) <= case.limit


@every_twin
@torch.no_grad()
def test_encoder_states(case: Case) -> None:
    ids, mask, kept = case.encoder_inputs.ids, case.encoder_inputs.mask, case.encoder_inputs.kept
    expected = case.their_t5gemma.model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    assert difference(case.t5gemma().encode(ids, kept)[kept], expected[kept]) <= case.limit


@every_twin
@torch.no_grad()
def test_decoder_logits_with_visible_memory(case: Case) -> None:
    model, inputs, encoder_inputs = case.t5gemma(), case.inputs, case.encoder_inputs
    expected = case.their_t5gemma(
        input_ids=encoder_inputs.ids,
        attention_mask=encoder_inputs.mask,
        decoder_input_ids=inputs.ids,
        decoder_attention_mask=inputs.mask,
    ).logits
    memory = model.encode(encoder_inputs.ids, encoder_inputs.kept)
    found = decoder_logits(model, inputs, memory, encoder_inputs)
    assert difference(found[inputs.kept], expected[inputs.kept]) <= case.limit


@every_image_twin
@torch.no_grad()
def test_image_features_of_both_models(case: Case) -> None:
    images = pixels(3, case.dtype)
    # The tower's attention is fused: in bfloat16 up to 2 ulp of a feature between 2 and 4.
    limit = max(case.limit, 0.04 if case.dtype == torch.bfloat16 else 0.0)
    for theirs, vision in (
        (case.their_gemma.model, case.gemma().vision),
        (case.their_t5gemma.model.encoder, case.t5gemma().vision),
    ):
        assert vision is not None
        assert images.shape == vision.pixel_shape(3)
        assert difference(vision.features(images), theirs.get_image_features(images).pooler_output) <= limit


@every_image_twin
@torch.no_grad()
def test_encoder_states_with_images(case: Case) -> None:
    model = case.t5gemma()
    inputs, count = with_images(case.encoder_inputs, case.their_t5gemma.config.image_token_index)
    images = pixels(count, case.dtype)
    expected = case.their_t5gemma.model.encoder(
        input_ids=inputs.ids, attention_mask=inputs.mask, pixel_values=images
    ).last_hidden_state
    # Each uses its own soft tokens, so that layers do not amplify the tower's rounding differences.
    features = case.their_t5gemma.get_image_features(images).pooler_output
    found = model.encode(inputs.ids, inputs.kept, features)
    assert difference(found[inputs.kept], expected[inputs.kept]) <= case.limit


@every_image_twin
@torch.no_grad()
def test_gemma_3_logits_with_images_that_see_themselves_both_ways(case: Case) -> None:
    model = case.gemma()
    token = case.their_gemma.config.image_token_index
    inputs, count = with_images(case.inputs, token)
    images = pixels(count, case.dtype)
    expected = case.their_gemma(
        input_ids=inputs.ids,
        attention_mask=inputs.mask,
        pixel_values=images,
        token_type_ids=(inputs.ids == token).long(),
    ).logits
    features = case.their_gemma.get_image_features(images).pooler_output
    found = model.logits(inputs.ids, inputs.kept, features)
    assert difference(found[inputs.kept], expected[inputs.kept]) <= case.limit


@every_twin_in_float32
@torch.no_grad()
def test_32_greedy_tokens_with_and_without_cache(case: Case) -> None:
    model, inputs = case.t5gemma(resident=True), case.encoder_inputs
    theirs = case.their_t5gemma.generate(
        input_ids=inputs.ids, attention_mask=inputs.mask, max_new_tokens=32, do_sample=False, eos_token_id=None
    )
    expected = theirs[:, 1:]
    assert expected.shape == (3, 32)
    start = case.their_t5gemma.config.decoder.bos_token_id
    for cached in (True, False):
        assert greedy_tokens(model, inputs, 32, start=start, cached=cached).tolist() == expected.tolist()


@two_twins_in_float32
@torch.no_grad()
def test_decoder_states_are_the_same_from_a_cache_filled_in_pieces(case: Case) -> None:
    model, inputs, encoder_inputs = case.t5gemma(resident=True), case.inputs, case.encoder_inputs
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


@two_twins_in_float32
@torch.no_grad()
def test_the_fused_kernel_computes_the_same(case: Case) -> None:
    eager, fused, inputs, encoder_inputs = case.t5gemma(), case.t5gemma(kernel="sdpa"), case.inputs, case.encoder_inputs
    memory = eager.encode(encoder_inputs.ids, encoder_inputs.kept)
    kept = encoder_inputs.kept
    torch.testing.assert_close(fused.encode(encoder_inputs.ids, kept)[kept], memory[kept], rtol=1e-4, atol=1e-5)
    expected = decoder_logits(eager, inputs, memory, encoder_inputs)[inputs.kept]
    found = decoder_logits(fused, inputs, memory, encoder_inputs)[inputs.kept]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        case.gemma(kernel="sdpa").logits(inputs.ids, inputs.kept)[inputs.kept],
        case.gemma().logits(inputs.ids, inputs.kept)[inputs.kept],
        rtol=1e-4,
        atol=1e-5,
    )


@cases(("text-13", "bfloat16"), ("images-8", "float32"), ("text-real-vocabulary", "float32"))
@torch.no_grad()
def test_resident_parameters_change_nothing(case: Case) -> None:
    inputs, encoder_inputs = case.inputs, case.encoder_inputs
    streamed, resident = case.t5gemma(), case.t5gemma(resident=True)
    memory = streamed.encode(encoder_inputs.ids, encoder_inputs.kept)
    expected = decoder_logits(streamed, inputs, memory, encoder_inputs)
    logits = case.gemma().logits(inputs.ids, inputs.kept)
    gemma = case.gemma(resident=True)
    for _ in range(2):
        assert torch.equal(resident.encode(encoder_inputs.ids, encoder_inputs.kept), memory)
        assert torch.equal(decoder_logits(resident, inputs, memory, encoder_inputs), expected)
        assert torch.equal(gemma.logits(inputs.ids, inputs.kept), logits)
