"""How T5Gemma 2 is judged that was made of Gemma 3."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import Tensor

from t5g2convert.checkpoint.families.gemma3 import MULTIMODAL, TEXT_ONLY
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE, T5Gemma2, read_t5gemma2
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.parity.checks.config import judge_config
from t5g2convert.parity.checks.generation_config import generation_faults
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.checks.text import judge_text
from t5g2convert.parity.checks.tokenizer import judge_tokenizer, make_tokenizer_check
from t5g2convert.parity.checks.vision import judge_vision
from t5g2convert.parity.declared_changes import change_remarks, on_source_settings
from t5g2convert.parity.expected_stacks import Ancestor, Ancestors
from t5g2convert.parity.parents import Gemma3Parent, taken_layers
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.session import Judge
from t5g2convert.parity.suites.base import Kind
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower

PARITIES: Final = ("vision_parity", "decoder_parity", "encoder_parity")


class ToT5Gemma2(Kind[Gemma3Parent]):
    """Gemma 3 to T5Gemma 2: both stacks are the parent's, the tower the parent's or a donor's."""

    sources = (MULTIMODAL, TEXT_ONLY)
    targets = (MODEL_TYPE,)
    parities = PARITIES

    def parent(self, sources: Sources) -> Gemma3Parent:
        """Gemma 3."""
        return Gemma3Parent(sources)

    def read(self, target: Checkpoint) -> T5Gemma2:
        """T5Gemma 2."""
        return read_t5gemma2(target.config, target.path / "config.json")

    def against(self, judge: Judge, parent: Gemma3Parent, target: Checkpoint) -> None:
        """config, tokenizer and the parities."""
        changes, projector = judge.changes, judge.options.get("projector")
        judge.make(["config"], lambda: [_config(judge, parent, target)])
        make_tokenizer_check(
            judge, target, lambda: judge_tokenizer(parent.folders, parent.model(projector), target, judge.manifest)
        )
        judge.remarks += change_remarks(target, changes)
        reading = judge.reading(rounded=True)
        tower = parent.tower(**reading)
        if tower is None:
            judge.skip(["vision_parity"], "the source has no images")
        if judge.unfit(PARITIES if tower is not None else PARITIES[1:], target):
            return

        def passes() -> list[Check]:
            parents = _ancestors(judge, parent)
            judge.remarks += _pairing_remarks(judge.options, parents)
            settled = read_t5gemma2(on_source_settings(target, changes), target.path / "config.json")
            t5gemma = T5Gemma2Reference(target, model=settled, **judge.reading())
            features = None if tower is None else _look(judge, tower, t5gemma)
            batch = judge.inputs.batch(t5gemma)
            # With a tower from elsewhere there is no Gemma 3 that reads text and images.
            seen = features is not None and parent.donor is None
            images = judge.inputs.image_batch(t5gemma, features) if seen and features is not None else None
            return judge_text(parents, t5gemma, batch, images, tolerance=judge.tolerance, progress=judge.progress)

        judge.make(PARITIES[1:], passes)

    def runs(self, judge: Judge, target: Checkpoint) -> Check:
        """Encoder and decoder together."""
        blind = judge.options.get("projector") == "zeros"
        return judge_runs(T5Gemma2Reference(target, **judge.reading()), blind=blind, progress=judge.progress)


def _ancestors(judge: Judge, parent: Gemma3Parent) -> Ancestors:
    """What encoder and decoder should compute: each its own parent's layers, over the table that the target has."""
    reading = judge.reading(rounded=True)
    encoder = decoder = Gemma3Reference(parent.checkpoint, **reading)
    if parent.decoder is not parent.checkpoint:
        decoder = Gemma3Reference(parent.decoder, **reading)
        if judge.options.get("embedding_from") == "decoder-from":
            encoder = encoder.with_table_of(decoder)
        else:
            decoder = decoder.with_table_of(encoder)
    return Ancestors(
        Ancestor(encoder, taken_layers("encoder", len(encoder.text), judge.options)),
        Ancestor(decoder, taken_layers("decoder", len(decoder.text), judge.options)),
    )


def _pairing_remarks(options: Mapping[str, Any], parents: Ancestors) -> Iterator[str]:
    """What each stack is compared with, where it is not the source whole."""
    if parents.encoder.gemma is not parents.decoder.gemma:
        given, other = ("source", "decoder's parent")
        if options.get("embedding_from") == "decoder-from":
            given, other = other, given
        yield f"the {other} is computed with the embedding table of the {given}, which is the target's"
    for part, ancestor in (("encoder", parents.encoder), ("decoder", parents.decoder)):
        if f"{part}_layers" in options:
            taken = ", ".join(map(str, ancestor.layers))
            yield f"the {part} is compared with these of its parent's {len(ancestor.gemma.text)} layers: {taken}"


def _config(judge: Judge, parent: Gemma3Parent, target: Checkpoint) -> Check:
    model, stacks = parent.model(judge.options.get("projector")), parent.stacks(judge.options)
    old, new = model.tokens.image_token_index, judge.new_values.get("image_token_index")
    move = None if new is None else (old, new)
    faults = generation_faults(parent.writing, target.path, stacks.decoder, move)
    return judge_config(
        model, target, judge.new_values, generation=faults, donated=parent.donor is not None, stacks=stacks
    )


def _look(judge: Judge, tower: VisionTower, t5gemma: T5Gemma2Reference) -> Tensor | None:
    """vision_parity; the image features of the source's tower, if the target has one too."""
    pixels = judge.inputs.pixels(tower).to(judge.device)
    features: list[Tensor] = []

    def look() -> list[Check]:
        if t5gemma.vision is None:
            return [Check("vision_parity", False, "the source has a vision tower, the target a stub of no layers")]
        check, seen = judge_vision(
            tower,
            t5gemma.vision,
            pixels,
            projected=judge.options.get("projector") in (None, "copy"),
            tolerance=judge.tolerance,
            progress=judge.progress,
        )
        features.append(seen)
        return [check]

    judge.make(["vision_parity"], look)
    return features[0] if features else None
