"""The sections of a model card: differences from the parent, provenance, training, verification, loading, license."""

import json
import re
import shlex
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import ConfigSection, Number, parse_section
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest
from t5g2convert.checkpoint.training_record import (
    AdaptationRecord,
    PairSettings,
    TaskRecord,
    TrainingSettings,
    UL2Settings,
)
from t5g2convert.publish.base_model import ROLES, BaseCheckpoint, command
from t5g2convert.publish.card_templates import CardTemplate, adapting, loading
from t5g2convert.publish.license import SourceLicense
from t5g2convert.publish.markdown import code, fenced, table

NOT_ESTABLISHED: Final = (
    "learning rate", "weight decay", "optimizer", "its noise", "whether the prefix task has a sentinel", "packing",
)  # fmt: skip
"""Unknown facts about Google's training of T5Gemma 2: a run uses its user's choice or a default of this tool."""

_UNUSED: Final = re.compile(r"<unused[0-9]{1,6}>")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


class RecordedCheck(ConfigSection):
    """One check of a recorded verification."""

    name: str
    passed: bool
    detail: str


class RecordedVerification(ConfigSection):
    """A verification as the manifest records it; the manifest's own reader does not validate it."""

    passed: bool
    dtype: str | None
    device: str
    tolerance: Number
    checks: list[RecordedCheck]
    skipped: dict[str, str]
    remarks: list[str]

    @property
    def held(self) -> bool:
        """Whether at least one check was made, and all passed."""
        return self.passed and bool(self.checks) and all(check.passed for check in self.checks)


def read_verification(manifest: Manifest, folder: Path) -> RecordedVerification | None:
    """Return the verification that a manifest records; None if the folder was not verified.

    Raises:
        CheckpointError: The record is not valid.
    """
    found = manifest.verification
    return None if found is None else parse_section(RecordedVerification, found, folder / MANIFEST_FILE, "verification")


@dataclass(frozen=True, slots=True)
class CardContent:
    """The data from which a card is made.

    Attributes:
        template: The texts for this kind of model.
        manifest: The folder's manifest; for a model trained elsewhere, the manifest of the model it was trained from.
        files: The names of its files.
        parameters: The number of parameters by part, with `total`.
        sources: The checkpoints that it was made from, the source first.
        verification: The recorded verification.
        license: The license of the source.
        repo: Its name on the Hub; empty if unknown.
        trained_dtype: The dtype of a model trained elsewhere; None for other models.
    """

    template: CardTemplate
    manifest: Manifest | None
    files: Collection[str]
    parameters: Mapping[str, int]
    sources: list[BaseCheckpoint]
    verification: RecordedVerification | None
    license: SourceLicense
    repo: str
    trained_dtype: str | None = None


def sections(content: CardContent, license_text: str) -> Iterator[str]:
    """Yield all sections in Markdown, one heading, paragraph or block at a time."""
    template, files = content.template, content.files
    yield from ("## What this is", template.what)
    yield from _differences(content)
    yield "## How it was made"
    yield from _provenance(content)
    yield from ("## Parameters", _parameters(content.parameters))
    yield "## Verification"
    yield from _verification(content.verification, elsewhere=content.trained_dtype is not None)
    yield "## How to load it"
    yield from loading(template, files, content.repo or ".")
    if not content.repo:
        yield 'The name `"."` works in a program that runs in this folder; otherwise use its path or name on the Hub.'
    yield "## How to adapt it"
    yield from adapting(template, files)
    yield from ("## License", license_text)


def _differences(content: CardContent) -> Iterator[str]:
    """Yield how the model differs from its parent."""
    if content.manifest is None:
        return
    options, roles = content.manifest.options, [source.role for source in content.sources]
    if "decoder_layers" in options:
        yield "Its decoder has only some of its parent's layers, so it does not compute what its parent computes."
    if "encoder_layers" in options:
        yield "Its encoder has only some of the source's layers."
    if "encoder_norm" in options:
        yield (
            f"The final norm of its encoder multiplies by {options['encoder_norm']} everywhere, not by the factors of "
            "the source's norm."
        )
    if "decoder_from" in roles:
        embedding = ROLES["decoder_from" if options.get("embedding_from") == "decoder-from" else "source"]
        yield (
            "Its encoder has the layers of the source, its decoder those of the decoder's parent, and both use the "
            f"embedding table of {embedding}."
        )
    if "vision_from" in roles and options.get("projector") == "zeros":
        yield "Its projector from images to the encoder is all zeros: until it is trained, images have no effect."
    changes = content.manifest.changes
    if changes:
        yield "These settings differ from the source's. The statements about a parent above hold with its settings:"
        rows = [[code(item.field), code(_json(item.source)), code(_json(item.target))] for item in changes]
        yield table(["setting", "source", "here"], rows)


def _provenance(content: CardContent) -> Iterator[str]:
    """Yield the command, the map, the tool, and every file that was read."""
    manifest = content.manifest
    if content.trained_dtype is not None:
        dtype = code(CONFIG_NAMES.get(content.trained_dtype, "mixed"))
        yield f"It was trained elsewhere; its weights are now {dtype}. Nothing else is known about the training."
        if manifest is not None:
            yield "The model it was trained from was made like this:"
    if manifest is None:
        yield "How the model it was trained from was made is not recorded."
        return
    mapping: list[list[str]] = []
    if manifest.merged is not None:
        yield from _merge(manifest, content.sources[0].argument)
        if manifest.adaptation is not None:
            yield "The model that the adapter was merged into was trained like this:"
            yield from _training(manifest.adaptation, None, source="START")
    elif manifest.adaptation is not None:
        cast_to = manifest.options.get("dtype")
        yield from _training(
            manifest.adaptation, None if cast_to is None else str(cast_to), source=content.sources[0].argument
        )
    else:
        yield fenced("console", [f"$ {command(manifest, content.sources, content.template.part)}"])
    if manifest.mapping is not None:
        mapping = [["map", f"{code(manifest.mapping.name)}, sha256 {_sha256(manifest.mapping.sha256)}"]]
    rows = [
        ["tool", f"{code(manifest.tool.name)} {code(manifest.tool.version)}"],
        *mapping,
        *[[ROLES[source.role], source.description] for source in content.sources],
        ["dtype", code(manifest.dtype)],
    ]
    yield table(["what", "which"], rows)
    if any(source.repo for source in content.sources):
        yield "The Hub has no word for this relation to a base model; the metadata use the closest one."
    rows = [
        [ROLES[source.role], code(name), _sha256(sha256)]
        for source in content.sources
        for name, sha256 in source.files.items()
    ]
    yield table(["read from", "file", "sha256"], rows)


def _merge(manifest: Manifest, source: str) -> Iterator[str]:
    """Yield how an adapter was merged into a model."""
    merged, cast_to = manifest.merged, manifest.options.get("dtype")
    assert merged is not None, "called for a merge"
    dtype = "" if cast_to is None else f" --dtype {cast_to}"
    yield fenced("console", [f"$ t5g2 merge {source} ADAPTER OUTPUT{dtype}"])
    groups = [f"rank {group.rank} and scale {group.scale:g}" for group in merged.targets]
    rows = [
        ["kind", "LoRA: W + scale times B A, rounded once"],
        ["changed tensors", f"{merged.tensors}, listed in `t5g2.json`; all others are the source's"],
        ["products", "; ".join(groups[:4]) + (f"; and {len(groups) - 4} more" if len(groups) > 4 else "")],
        *([code(name), f"sha256 {code(digest)}"] for name, digest in merged.adapter.items()),
    ]
    yield table(["adapter", "value"], rows)


def _training(adaptation: AdaptationRecord, dtype: str | None, *, source: str) -> Iterator[str]:
    """Yield how a model was trained further, from its manifest.

    Args:
        adaptation: The manifest's `adaptation`.
        dtype: The dtype that the model was cast to, if any.
        source: The argument for the trained model in a command.
    """
    averaged, settings = adaptation.checkpoints, adaptation.settings
    verb = "finetune" if isinstance(settings, PairSettings) else "adapt"
    average = [f"$ t5g2 average RUN --last {len(averaged)}"] if len(averaged) > 1 else []
    flags = [*_flags(settings), *([f"--save-every {averaged[-1] - averaged[-2]}"] if average else [])]
    yield fenced("console", [f"$ t5g2 {verb} {source} DATA RUN {' '.join(flags)}", *average])
    yield table(["training", "value"], _training_rows(adaptation, dtype))
    if not isinstance(settings, UL2Settings):
        return
    yield "The tasks and their weights:"
    rows = [
        [
            code(task.name),
            task.kind,
            f"{task.rate:g}",
            "one" if task.mean_span is None else f"{task.mean_span:g}",
            str(task.weight),
            _markers(task),
        ]
        for task in settings.mixture.tasks
    ]
    yield table(["task", "kind", "rate", "mean span", "weight", "markers"], rows, right=(2, 3, 4))
    yield (
        "Google has not published these parts of its own training, so they are choices of this run or defaults of "
        f"t5g2: {', '.join(NOT_ESTABLISHED)}."
    )


def _earlier_rows(adaptation: AdaptationRecord | None) -> Iterator[list[str]]:
    """Yield what had been done to the model before its training, newest first."""
    while adaptation is not None:
        merged = adaptation.merged
        while merged is not None:
            yield ["merged before", f"a LoRA adapter, into {merged.tensors:,} tensors"]
            merged = merged.before
        if (adaptation := adaptation.before) is not None:
            kind = "pairs" if isinstance(adaptation.settings, PairSettings) else "UL2"
            yield ["trained before with", f"{kind}, {adaptation.steps:,} steps"]


def _training_rows(adaptation: AdaptationRecord, dtype: str | None) -> Iterator[list[str]]:
    averaged, settings, teacher = adaptation.checkpoints, adaptation.settings, adaptation.settings.teacher
    weights = f"step {adaptation.steps:,}"
    if len(averaged) > 1:
        weights = f"mean of {len(averaged)} checkpoints, from steps {', '.join(f'{step:,}' for step in averaged)}"
    yield ["weights", weights + ("" if dtype is None else f", in {code(dtype)}")]
    yield ["training tokens", f"{adaptation.tokens:,}"]
    yield ["trained on", "the data" if teacher is None else f"the data and the teacher {code(teacher)}"]
    ul2 = adaptation.ul2
    if isinstance(settings, PairSettings):
        yield ["objective", "pairs of an input and a target; the loss is that of the targets alone"]
    yield from _earlier_rows(adaptation)
    if ul2 is not None and (first := ul2.mixture.first_sentinel) is not None:
        # `code` escapes angle brackets, but the names of Gemma's unused tokens need them.
        named = f"`{first}`" if _UNUSED.fullmatch(str(first)) else code(first)
        yield ["first sentinel", f"{named}; the others descend from it"]
    yield ["trained tensors", f"{len(adaptation.trained)} names, listed in `t5g2.json`"]
    yield ["frozen parts", ", ".join(map(code, adaptation.frozen)) or "none"]
    yield [
        "learning rate",
        f"{settings.lr:g} after {settings.warmup:,} steps, then a cosine to {settings.lr_floor:g} of that at "
        f"step {settings.steps:,}",
    ]
    low, high = settings.betas
    yield [
        "optimizer",
        f"AdamW, betas {low:g} and {high:g}, weight decay {settings.weight_decay:g}, gradients clipped at "
        f"{settings.clip:g}",
    ]
    if adaptation.earlier:
        steps = ", ".join(f"{leg.until:,}" for leg in adaptation.earlier)
        yield ["settings changed", f"after step {steps}; the values above are those since then"]
    yield ["settings", f"in `t5g2.json`, sha256 {code(adaptation.settings_sha256)}"]
    yield ["data", f"sha256 {code(adaptation.data_sha256)}"]


def _flags(settings: TrainingSettings) -> Iterator[str]:
    """Yield the options of the training that matter most for the result."""
    ul2 = ("batch_tokens", "encoder_length", "decoder_length", "image_every")
    pairs = ("batch_pairs", "eval_pairs", "lr_encoder", "lr_decoder", "lr_projector")
    for name in ("lr", "steps", *ul2, *pairs, "warmup", "seed"):
        if (value := getattr(settings, name, None)) is not None:
            yield f"--{name.replace('_', '-')} {value}"
    if isinstance(settings, UL2Settings) and settings.documents != "packed":
        yield f"--documents {settings.documents}"
    if settings.teacher is not None:
        yield "--kd PARENT"
    if settings.freeze_until:
        yield f"--freeze-until {settings.freeze_until}"
        yield from (f"--trainable {shlex.quote(pattern)}" for pattern in settings.trainable)


def _markers(task: TaskRecord) -> str:
    """Describe the tokens that mark a task for the model."""
    mode = [] if task.mode_token is None else [f"mode token {task.mode_token}"]
    return ", ".join([*mode, *(["sentinels"] if task.sentinel else [])]) or "none"


def _verification(record: RecordedVerification | None, *, elsewhere: bool) -> Iterator[str]:
    if elsewhere:
        yield (
            "**Not recorded.** `t5g2 verify FOLDER --source START` shows which tensors have moved and how far, and "
            "whether settings, tokens and the vision tower are unchanged."
        )
        return
    if record is None:
        yield "**Not verified.** `t5g2 verify OUTPUT --source SOURCE` compares it with its source and saves the result."
        return
    verdict = "Verified" if record.held else "**Verification failed: do not use this.** It was compared"
    allowed = "no difference" if record.tolerance == 0 else f"differences up to {record.tolerance:g}"
    where = "" if record.dtype is None else f" in {code(record.dtype)} on {code(record.device)}"
    yield f"{verdict} against its source by `t5g2 verify`, which runs both models itself{where} and allowed {allowed}."
    rows = [
        [code(check.name), "passed" if check.passed else "**FAILED**", code(check.detail)] for check in record.checks
    ]
    rows += [[code(name), "skipped", code(because)] for name, because in record.skipped.items()]
    yield table(["check", "result", "what was compared, and the result"], rows)
    if record.remarks:
        yield "\n".join(f"- {code(remark)}" for remark in record.remarks)


def _parameters(parameters: Mapping[str, int]) -> str:
    total = parameters.get("total") or 1
    rows = [[code(part), f"{count:,}", f"{count / total:.1%}"] for part, count in parameters.items()]
    return table(["part", "parameters", "share"], rows, right=(1, 2))


def _sha256(text: str | None) -> str:
    if text is None:
        return "not computed"
    return code(text) if _DIGEST.fullmatch(text) else f"{code(text)}, which is not a sha256"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
