"""The rules for the treatment of every setting of a config, and their application to a section.

The lists of settings are data in `known_settings`; docs/settings.md is made from them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from t5g2convert.errors import CheckpointError

MOST_NAMED: Final = 50
"""Maximum number of settings that one note lists."""


class Outcome(StrEnum):
    """The treatment of a setting."""

    USED = "used"
    """Read: it determines the output, or is compared with a setting that does."""
    CARRIED = "carried"
    """Written to the output unchanged."""
    REFUSED = "refused"
    """Refused: it would change the computation, and cannot be converted."""
    NOTED = "noted"
    """Left out, and named in a note."""
    ABOUT = "left behind"
    """Ignored: it says who wrote the file, but nothing about the model."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A known setting.

    Attributes:
        name: Its key.
        outcome: Its treatment.
        because: The reason, in a few words.
        neutral: Values that change nothing, like null; they are neither refused nor noted.
    """

    name: str
    outcome: Outcome
    because: str
    neutral: tuple[Any, ...] = ()

    def is_neutral(self, value: object) -> bool:
        """Return whether a value changes nothing. Numbers are compared as numbers, but True is not 1."""
        numbers = (int, float)
        return any(
            value == other and (type(value) is type(other) or (type(value) in numbers and type(other) in numbers))
            for other in self.neutral
        )


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a file, with its known settings.

    Attributes:
        title: Its title on the page docs/settings.md.
        settings: The known settings.
        owner: The model that has these settings, for errors.
        closed: Whether every unknown key is refused, whatever its name.
    """

    title: str
    settings: tuple[Setting, ...]
    owner: str
    closed: bool = False

    def get(self, name: str) -> Setting | None:
        """Return a setting by its name; None if it is unknown."""
        return next((setting for setting in self.settings if setting.name == name), None)


@dataclass(frozen=True, slots=True)
class Left:
    """A setting that is left out: its place, and whether it is known."""

    place: str
    known: bool


NULL_IS_A_VALUE: Final = ("attn_logit_softcapping", "final_logit_softcapping")
"""Settings that null turns off for all readers; Gemma 2 turns them on if they are absent."""


def present(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config without nulls, which mean absent, except nulls that turn a setting off."""
    return {
        key: present(value) if isinstance(value, dict) else value
        for key, value in node.items()
        if value is not None or key in NULL_IS_A_VALUE
    }


def account(section: Section, fields: Mapping[str, Any], where: Path, place: str = "") -> tuple[Left, ...]:
    """Check every setting of a section, and return those that are left out; see `known_settings`.

    Args:
        section: Its known settings.
        fields: The section, without nulls.
        where: The file, for errors.
        place: The section's name in the file, with a final dot.

    Returns:
        The settings that are not used.

    Raises:
        CheckpointError: A setting changes the computation and cannot be converted, or may change it and is unknown;
            the message lists all of them.
    """
    refused: list[str] = []
    left: list[Left] = []
    for name, value in fields.items():
        if value is None:
            continue
        setting, at = section.get(name), f"{place}{name}"
        if setting is None:
            if section.closed or (decides(name) and not _is_off(value)):
                refused.append(f"{at} is {_short(value)}, which is not a setting of {section.owner}")
            else:
                left.append(Left(at, known=False))
        elif setting.outcome is Outcome.REFUSED and not setting.is_neutral(value):
            refused.append(f"{at} is {_short(value)}: {setting.because}")
        elif setting.outcome is Outcome.NOTED and not setting.is_neutral(value):
            left.append(Left(at, known=True))
    if refused:
        first, *others = refused
        more = f" (and {len(others)} more refused settings)" if others else ""
        raise CheckpointError(
            first + more, where=where, hint="remove it if it has no effect", details=refused if others else ()
        )
    return tuple(left)


def left_note(left: Iterable[Left]) -> Iterator[str]:
    """Yield a note that lists all settings that are left out, if there are any."""
    items = tuple(left)
    known, unknown = (_some([item.place for item in items if item.known is which]) for which in (True, False))
    told = [known] if known else []
    told += [f"{unknown} (unknown)"] if unknown else []
    if told:
        yield f"config.json: settings left behind: {'; '.join(told)}"


def decides(name: str) -> bool:
    """Return whether an unknown setting, by its name, may change the computation."""
    words = set(re.split(r"[^a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))
    return bool(words & COMPUTING) and not words & TRAINING


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


COMPUTING: Final = _words(
    "act activation alibi altup attend attention attn bias bidirectional cap causal chunk chunked conv depth dim dims "
    "dropout embed embedding embeddings eps epsilon expert experts factor ffn freq frequency gate gated gating "
    "head heads hidden intermediate interleaved key keys kv laurel layer layernorm layers logit "
    "logits lora mask masks mlp mixture moe mrope multiplier mup norm norms parallel position positional positions qk "
    "qkv quant quantization quantized query recurrent residual residuals rms rmsnorm rope rotary router routing scalar "
    "scale scaled scaling sink sinks size skip sliding softcap softcapping softmax sparse sparsity ssm temperature "
    "theta tie tied value values vocab vocabulary width window windows yarn"
)
"""Words in the names of settings that change the computation."""

TRAINING: Final = _words(
    "batch checkpoint checkpointing dataset epoch epochs finetuning learning loss lr optim optimizer peft pretraining "
    "rank steps train trainer training unsloth wandb warmup"
)
"""Words in the names of settings that only record how a model was trained."""


def _is_off(value: object) -> bool:
    """Return whether a value has no effect: a switch that is off, or an empty list."""
    return value is False or value in ("", [], {})


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:MOST_NAMED])
    return shown if len(names) <= MOST_NAMED else f"{shown} and {len(names) - MOST_NAMED} more"
