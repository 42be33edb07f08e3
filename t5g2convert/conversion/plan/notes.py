"""The notes of a plan: sentences for the user about a conversion."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.altered_weights import remarks
from t5g2convert.checkpoint.families import t5gemma, t5gemma2
from t5g2convert.checkpoint.families.gemma3 import TOWERLESS, is_towerless
from t5g2convert.checkpoint.families.registry import target_of
from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, VISION_FROM, Role, named
from t5g2convert.conversion.assets.generation_config import given_generation
from t5g2convert.conversion.option_values import KEEP
from t5g2convert.conversion.options import SMALLEST_WINDOW, PlanOptions
from t5g2convert.conversion.plan.changes import setting
from t5g2convert.conversion.plan.drafts import Draft
from t5g2convert.conversion.plan.layer_spec import with_full_attention, written
from t5g2convert.conversion.plan.types import Change
from t5g2convert.conversion.plan.vocabulary import has_names
from t5g2convert.mapping.problems import flag
from t5g2convert.mapping.resolution import SUBJECTS, Resolution
from t5g2convert.mapping.row_resolution import ResolvedDrop
from t5g2convert.mapping.schema import WeightMap

LENGTH: Final = "max_position_embeddings"
FAILING: Final[Mapping[str, tuple[Any, ...]]] = {"guidance_scale": (1, 1.0), "prefill_chunk_size": ()}
"""Settings of generation_config.json that work for Gemma 3 in transformers 5.24 but fail with an encoder, and the
values that switch them off."""

FACTORS: Final[Mapping[str, str]] = {
    "rope_parameters.full_attention.factor": "full layers",
    "rope_parameters.factor": "all layers",
}
"""Linear factors of RoPE, and the layers that they apply to."""


def plan_notes(
    resolution: Resolution,
    drafts: Sequence[Draft],
    changes: Sequence[Change],
    options: PlanOptions,
    weight_map: WeightMap,
    config: Mapping[str, Any],
) -> Iterator[str]:
    """Yield all notes of a plan, in display order; `config` is the target's."""
    for checkpoint in resolution.checkpoints.values():
        yield from checkpoint.notes
        yield from remarks(checkpoint)
    yield from _towerless(resolution)
    yield from _configs(resolution, config)
    yield from _vocabulary(resolution, drafts, changes)
    yield from _settings(changes, tuple(target_of(config, Path("config.json")).stacks.values()))
    if options.preset is not None:
        for name in weight_map.presets[options.preset].assumed:
            yield f"preset {options.preset}: the release's {name} is not established"
    yield from _layers(resolution, config)
    yield from _encoder_norm(options)
    yield from _decoder(resolution)
    yield from _images(resolution, drafts)
    if config["model_type"] == t5gemma.MODEL_TYPE and resolution.values.get("attn_logit_softcapping"):
        yield "load it with attn_implementation='eager': the default in transformers 5.0 computes something else"
    yield from _windows(config)
    if config["dtype"] == "float16":
        yield _half(config)
    dtypes = sorted({draft.dtype for draft in drafts})
    if options.dtype == KEEP and len(dtypes) > 1:
        yield f"tensors have several dtypes ({', '.join(dtypes)}); config.json names {config['dtype']}"
    yield from _drops(resolution)
    yield from _generation(resolution)
    for option in sorted(options.drops - {drop.drop.option for drop in resolution.drops}):
        yield f"{flag(option)} has no effect: the source has no such tensor"


def _generation(resolution: Resolution) -> Iterator[str]:
    """Yield notes on settings that are carried but do not work with an encoder-decoder."""
    given = given_generation(resolution.checkpoints[resolution.role_of("decoder")])
    for name, neutral in FAILING.items():
        if name in given and given[name] not in neutral:
            yield (
                f"generation_config.json: {name} is carried, but transformers cannot generate with it from a model "
                "with an encoder: remove it there"
            )


def _towerless(resolution: Resolution) -> Iterator[str]:
    """Yield a note on each text model with a multimodal config."""
    for role, model in resolution.models.items():
        if is_towerless(model):
            yield f"{named(role, 'config.json')}: {TOWERLESS}"


def tied(resolution: Resolution, role: Role) -> bool:
    """Return whether a checkpoint's config ties the softmax to the embedding, or describes a head that is converted."""
    model = resolution.models[role]
    return model.values.get("tie_word_embeddings", True) is True or "untied" in model.features


def has_head(resolution: Resolution, role: Role) -> bool:
    """Return whether a checkpoint has a head that must equal the embedding."""
    return any(drop.role == role and drop.equals is not None for drop in resolution.drops)


def _configs(resolution: Resolution, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on settings of the sources' configs that the target's config lacks."""
    for role, model in resolution.models.items():
        checkpoint = resolution.checkpoints[role]
        owner = "" if role == SOURCE else f"{SUBJECTS[role]}: "
        yield from (f"{owner}{note}" for note in model.notes)
        stored = CONFIG_NAMES.get(checkpoint.dtype)
        for place, said in _dtypes(checkpoint.config):
            if said != stored:
                yield f"{owner}{place} is {said}, but most tensors are {stored}: the stored dtype is used"
        if role != VISION_FROM and not tied(resolution, role):
            yield f"{owner}tie_word_embeddings is false: convert refuses a head that is not the embedding"
    yield from _dropouts(config)


def _dtypes(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the dtypes that a config names, with their keys."""
    for section in ("", "text_config", "vision_config", "encoder", "decoder"):
        fields = config if not section else config.get(section)
        if isinstance(fields, dict):
            for name in ("dtype", "torch_dtype"):
                if isinstance(said := fields.get(name), str) and said != "auto":
                    yield f"{section}.{name}".removeprefix("."), said.removeprefix("torch.")


def _dropouts(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on attention dropouts that transformers ignores: its T5Gemma 2 uses one for all parts."""
    if config["model_type"] != t5gemma2.MODEL_TYPE:
        return
    for path in ("encoder.text_config", "encoder.vision_config", "decoder"):
        own = setting(config, f"{path}.attention_dropout")
        if own != config["attention_dropout"]:
            yield (
                f"{path}.attention_dropout is {own}, but transformers trains all parts with the top-level value, "
                f"{config['attention_dropout']}"
            )


def _windows(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on sliding windows that transformers cannot generate with."""
    for part, stack in target_of(config, Path("config.json")).stacks.items():
        kinds, window = (setting(config, f"{stack}{name}") for name in ("layer_types", "sliding_window"))
        if part == "decoder" and kinds and "sliding_attention" in kinds and window < SMALLEST_WINDOW:
            yield (
                f"sliding_window is {window}: transformers' generate fails with a cache; use use_cache=False, or "
                f"convert with --sliding-window {SMALLEST_WINDOW}"
            )


def _half(config: Mapping[str, Any]) -> str:
    """Return a warning for float16 models: by default a model is loaded in its stored dtype."""
    first = config["model_type"] == t5gemma.MODEL_TYPE
    activations = "activations may exceed" if first else "the activations of a real Gemma 3 exceed"
    return (
        f"the tensors are float16: {activations} its largest value, 65504, and then all logits are NaN; load the "
        "output with dtype=torch.float32 or dtype=torch.bfloat16"
    )


def _drops(resolution: Resolution) -> Iterator[str]:
    """Yield a note for each reason to drop tensors, and one for dropped names in the index that have no tensor."""
    by_reason: dict[str, list[ResolvedDrop]] = {}
    for drop in resolution.drops:
        by_reason.setdefault(drop.drop.because, []).append(drop)
    for because, drops in by_reason.items():
        first = drops[0]
        name = named(first.role, first.tensor.entry.name)
        subject = f"{name} is" if len(drops) == 1 else f"{len(drops)} tensors, the first of them {name}, are"
        asked = "" if first.drop.option is None else f", as {flag(first.drop.option)} requests"
        yield f"{subject} dropped: {because}{asked}{_comparison(first)}"
    for role, checkpoint in resolution.checkpoints.items():
        if checkpoint.unheld:
            yield (
                f"{named(role, INDEX_FILE)} names {some(checkpoint.unheld)}, which no shard holds; the map drops "
                "tensors with such names"
            )


def _comparison(drop: ResolvedDrop) -> str:
    """Describe the comparison of values that a dropped tensor still has to pass, if any."""
    if drop.equals is None:
        return ""
    one, other = drop.tensor.entry, drop.equals.entry
    dtypes = "" if one.dtype == other.dtype else f" ({one.dtype} against {other.dtype}, by value)"
    return f"; it must equal {named(drop.role, other.name)}{dtypes}, which convert checks before writing"


def _encoder_norm(options: PlanOptions) -> Iterator[str]:
    if (factor := options.encoder_factor) is not None:
        yield (f"the encoder's final norm multiplies by {factor:g} everywhere, not by its parent's factors")


def _vocabulary(resolution: Resolution, drafts: Sequence[Draft], changes: Sequence[Change]) -> Iterator[str]:
    for change in changes:
        if change.field == "vocab_size":
            yield f"the embedding table is cut from {change.source} to {change.target} rows"
        elif change.field in resolution.model.values and "vision" in resolution.model.features:
            yield f"{change.field} moves from {change.source} to {change.target}"
    for draft in drafts:
        if draft.content.kind == "zeros" and draft.origin is not None:
            yield f"{draft.name} is zeros: the vocabulary lacks the token"


def _settings(changes: Sequence[Change], stacks: Sequence[str]) -> Iterator[str]:
    """Yield notes on settings that differ from the source's: one note for all stacks if they agree."""
    by_setting: dict[str, list[Change]] = {}
    for change in changes:
        if change.field in ("dtype", "vocab_size"):
            continue  # settings of the whole model have separate notes
        stack = next((stack for stack in stacks if change.field.startswith(stack)), None)
        if stack is not None:
            setting = change.field.removeprefix(stack)
            # A user's own map may set lists and objects.
            by_setting.setdefault(repr((setting, change.source, change.target)), []).append(change)
    for alike in by_setting.values():
        field, source, target = alike[0].field, alike[0].source, alike[0].target
        stack = next(stack for stack in stacks if field.startswith(stack))
        name = field.removeprefix(stack) if len(alike) == len(stacks) else field
        yield f"{name} is {target}, its parent's is {source}: {_effect(field.removeprefix(stack), source, target)}"


def _effect(setting: str, source: Any, target: Any) -> str:
    """Return the effect of a setting that differs from the source's."""
    if type(target) in (int, float):
        if setting == LENGTH:
            return "longer inputs are allowed" if target > source else "shorter inputs are allowed"
        if setting in FACTORS:
            return f"positions in {FACTORS[setting]} are divided by {target:g}"
    return "this changes the computation"


def _layers(resolution: Resolution, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield notes on the layers that the stacks take from their parents."""
    stacks = target_of(config, Path("config.json")).stacks
    for part, layers in resolution.layers.items():
        parent = resolution.models[resolution.role_of(part)]
        depth, kinds = parent.dims["layers"], parent.values["layer_types"]
        yield f"the {part} takes {len(layers)} of its parent's {depth} layers: {', '.join(map(str, layers))}"
        kept = setting(config, f"{stacks[part]}layer_types")
        if kept and isinstance(kinds, list) and "full_attention" not in kept:
            window = setting(config, f"{stacks[part]}sliding_window")
            yield (
                f"--{part}-layers {written(layers, depth)} keeps no full-attention layer: each layer of the {part} "
                f"sees only {window} tokens; {_keeping(layers, kinds)}"
            )
    if resolution.layers:
        # Measured with the decoder alone of the real 270M.
        yield (
            "a stack with fewer layers than its parent must be trained before use: Gemma 3 270M's perplexity of 41.8 "
            "became 1.3e7 with 1:18:2 and 4.5e7 with 0:18:2"
        )
    if unused := resolution.unused_sources:
        yield f"{len(unused)} source tensor(s) are not used: the target has no place for them"


def _keeping(layers: Sequence[int], kinds: Sequence[str]) -> str:
    """Describe the selection that keeps full-attention layers, and their number."""
    chosen = with_full_attention(layers, kinds)
    if chosen is None:
        return "its parent has none"
    kept = sum(kinds[layer] == "full_attention" for layer in chosen)
    return f"{written(chosen, len(kinds))} keeps {kept}"


def _decoder(resolution: Resolution) -> Iterator[str]:
    """Yield notes on a decoder from another parent."""
    if DECODER_FROM not in resolution.checkpoints:
        return
    yield _taken(DECODER_FROM, "the decoder's parent", resolution)
    if resolution.table[0] == SOURCE:
        yield "both stacks use the source's embedding table: the decoder's parent has another"
    else:
        yield "both stacks use the embedding table of the decoder's parent: the source has another"
    if not has_names(resolution, DECODER_FROM):
        yield "not checked: whether both parents share a vocabulary (no tokenizer.json)"
    yield "the tokenizer is the source's; generated text starts and ends with the decoder parent's tokens"


def _taken(role: Role, whose: str, resolution: Resolution) -> str:
    """Describe how many tensors are taken from another checkpoint, each counted once."""
    taken = {item.source.entry.name for item in resolution.targets if item.role == role and item.source is not None}
    left = len(resolution.checkpoints[role].tensors) - len(taken)
    return f"{len(taken)} tensors are {whose}'s; its other {left} are not used"


def _images(resolution: Resolution, drafts: Sequence[Draft]) -> Iterator[str]:
    features = resolution.model.features
    if any(item.part == "vision" and item.source is None for item in resolution.targets):
        yield "the source has no vision tower: the target gets a stub of no layers and cannot read images"
    if VISION_FROM in resolution.checkpoints:
        yield _taken(VISION_FROM, "the donor", resolution)
    if "projector_zeros" in features:
        yield "the projector is zeros: images have no effect until it is trained"
    for alignment in (draft.content.alignment for draft in drafts):
        if alignment is not None:
            rows = f"{alignment.rows} rows of both embedding tables"
            yield f"the projector is the donor's, mapped by least squares between {rows}"
            if not has_names(resolution, VISION_FROM):
                yield f"not checked: whether the {rows} are the same tokens (no tokenizer.json)"
