"""The checks of a T5Gemma 2 that was converted from Gemma 3."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from t5g2convert.checkpoint.families.gemma3 import MULTIMODAL, TEXT_ONLY
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE, read_t5gemma2
from t5g2convert.parity.checks.config import generation_faults, judge_config
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.checks.text import ExpectedStack, ExpectedStacks, judge_text
from t5g2convert.parity.checks.tokenizer import has_tokenizer_files, judge_tokenizer
from t5g2convert.parity.replay import replay_conversion
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.session import Shared, Verification
from t5g2convert.parity.source_models import Gemma3Source, taken_layers
from t5g2convert.parity.suites.base import (
    NO_IMAGES,
    NO_TOKENIZER,
    Suite,
    compare_towers,
    conversion_remarks,
    integrity,
    on_source_settings,
    provenance,
)
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower


def _config(verification: Verification[Gemma3Source]) -> Check:
    source = verification.source
    model, stacks = source.model(verification.options.get("projector")), source.stacks(verification.options)
    old, new = model.tokens.image_token_index, verification.new_values.get("image_token_index")
    move = None if new is None else (old, new)
    return judge_config(
        model,
        verification.target,
        verification.new_values,
        generation=generation_faults(source.generation_folder, verification.output, stacks.decoder, move),
        donated=source.donor is not None,
        stacks=stacks,
    )


def _tokenizer(verification: Verification[Gemma3Source]) -> Check | Skipped:
    if not has_tokenizer_files(verification.output, verification.manifest):
        return NO_TOKENIZER
    source = verification.source
    model = source.model(verification.options.get("projector"))
    return judge_tokenizer(source.folders, model, verification.target, verification.manifest)


@Shared
def _tower(verification: Verification[Gemma3Source]) -> VisionTower | None:
    """The tower of the source or donor, as the conversion cast it."""
    return verification.source.tower(**verification.reading(rounded=True))


@Shared
def _model(verification: Verification[Gemma3Source]) -> T5Gemma2Reference:
    """The output with the old values of settings that were changed on purpose."""
    verification.require_tensors()
    target = verification.target
    settings = read_t5gemma2(on_source_settings(target, verification.changes), target.path / "config.json")
    return T5Gemma2Reference(target, model=settings, **verification.reading())


@Shared
def _seen(verification: Verification[Gemma3Source]) -> tuple[Check, Tensor | None]:
    """vision_parity, and the image features of the source's tower."""
    tower, model = _tower(verification), _model(verification)
    assert tower is not None, "the pass is made for a source with a tower"
    if model.vision is None:
        detail = "the source has a vision tower, but the target has a stub of no layers"
        return Check("vision_parity", False, detail), None
    projected = verification.options.get("projector") in (None, "copy")
    return compare_towers(verification, tower, model.vision, projected=projected)


def _vision_parity(verification: Verification[Gemma3Source]) -> Check | Skipped:
    return NO_IMAGES if _tower(verification) is None else _seen(verification)[0]


@Shared
def _text_parities(verification: Verification[Gemma3Source]) -> tuple[Check, Check, tuple[str, ...]]:
    """decoder_parity and encoder_parity, from one walk through the layers, and remarks on both."""
    model, expected = _model(verification), _expected_stacks(verification)
    batch = verification.inputs.batch(model)
    seen = _seen.if_known(verification)
    # With a donor's tower there is no Gemma 3 that reads both the text and the images.
    features = seen[1] if seen is not None and verification.source.donor is None else None
    images = None if features is None else verification.inputs.image_batch(model, features)
    decoder, encoder = judge_text(
        expected, model, batch, images, tolerance=verification.tolerance, progress=verification.progress
    )
    return decoder, encoder, (*_pairing_remarks(verification.options, expected), *batch.remarks)


def _decoder_parity(verification: Verification[Gemma3Source]) -> Check:
    decoder, _, remarks = _text_parities(verification)
    return decoder.remarked(remarks)


def _encoder_parity(verification: Verification[Gemma3Source]) -> Check:
    return _text_parities(verification)[1]


def _runs(verification: Verification[Gemma3Source]) -> Check:
    verification.require_tensors()
    model = T5Gemma2Reference(verification.target, **verification.reading())
    return judge_runs(model, blind=verification.options.get("projector") == "zeros", progress=verification.progress)


def _expected_stacks(verification: Verification[Gemma3Source]) -> ExpectedStacks:
    """Return what encoder and decoder must compute: the layers of their parents, over the target's table."""
    reading, source, options = verification.reading(rounded=True), verification.source, verification.options
    encoder = decoder = Gemma3Reference(source.checkpoint, **reading)
    if source.decoder is not source.checkpoint:
        decoder = Gemma3Reference(source.decoder, **reading)
        if options.get("embedding_from") == "decoder-from":
            encoder = encoder.with_table_of(decoder)
        else:
            decoder = decoder.with_table_of(encoder)
    norm = float(options["encoder_norm"]) if "encoder_norm" in options else None
    return ExpectedStacks(
        ExpectedStack(encoder, taken_layers("encoder", len(encoder.text), options), norm),
        ExpectedStack(decoder, taken_layers("decoder", len(decoder.text), options)),
    )


def _pairing_remarks(options: Mapping[str, Any], expected: ExpectedStacks) -> Iterator[str]:
    """Yield remarks on stacks that are not compared with the whole source."""
    if expected.encoder.gemma is not expected.decoder.gemma:
        table, other = ("source", "decoder's parent")
        if options.get("embedding_from") == "decoder-from":
            table, other = other, table
        yield f"the {other} is computed with the {table}'s embedding table, as in the target"
    for part, stack in (("encoder", expected.encoder), ("decoder", expected.decoder)):
        if f"{part}_layers" in options:
            taken = ", ".join(map(str, stack.layers))
            yield f"the {part} is compared with these of its parent's {len(stack.gemma.text)} layers: {taken}"


TO_T5GEMMA2: Final = Suite(
    sources=(MULTIMODAL, TEXT_ONLY),
    targets=(MODEL_TYPE,),
    open_source=Gemma3Source,
    read_config=read_t5gemma2,
    replay=replay_conversion,
    checks={
        "integrity": integrity,
        "provenance": provenance,
        "config": _config,
        "tokenizer": _tokenizer,
        "vision_parity": _vision_parity,
        "decoder_parity": _decoder_parity,
        "encoder_parity": _encoder_parity,
        "runs": _runs,
    },
    remarks=conversion_remarks,
)
"""A T5Gemma 2: both stacks are Gemma 3's, the vision tower is Gemma 3's or a donor's."""
