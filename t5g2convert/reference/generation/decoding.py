"""The settings of a decoding: those of generation_config.json, changed by options."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from t5g2convert.checkpoint.families.config_section import ConfigSection, Number, Token, parse_section
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.folder import read_json_if_there
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.options import GenerateOptions

DEFAULT_TOKENS: Final = 64
"""The largest number of tokens, if neither an option nor generation_config.json names it."""

LOWEST_TEMPERATURE: Final = 1e-4
"""Below it, the most probable token is as good as certain, and logits divided by it are not finite."""

DEFAULT_TOP_K: Final = 50
"""transformers' top_k for a generation_config.json that samples but does not name it."""

NOT_APPLIED: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "dola_layers": (),
}
"""Keys of generation_config.json that change what transformers generates, and their values without an effect."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the next tokens are chosen, and where a text ends.

    Attributes:
        temperature: Divides the logits; 0 for the most probable token.
        top_k: The number of most probable tokens to sample from; 0 for all.
        top_p: The probability of the tokens to sample from; 1 for all.
        seed: The seed of the sampling.
        max_new_tokens: The largest number of tokens.
        ends: Tokens that end a text.
        stops: Texts that end a text.
        ignored: Settings of generation_config.json that are not applied.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = DEFAULT_TOKENS
    ends: frozenset[int] = frozenset()
    stops: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is chosen."""
        return self.temperature < LOWEST_TEMPERATURE


class _GenerationConfig(ConfigSection):
    """The keys of generation_config.json that are applied."""

    do_sample: bool | None = None
    temperature: Annotated[Number, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1)] | None = None
    eos_token_id: Token | list[Token] | None = None


def read_decoding(folder: Path, options: GenerateOptions, *, eos: int | list[int] | None) -> Decoding:
    """Return the settings of a decoding: options, then generation_config.json, then transformers' defaults.

    It samples if an option asks for it, or if generation_config.json has `do_sample` and no option asks for greedy.

    Args:
        folder: The model's folder.
        options: The options of `generate`.
        eos: The end tokens of the decoder's config, if generation_config.json names none.

    Raises:
        CheckpointError: generation_config.json has a value of another type or range.
        UsageError: A sampling option is given, but the decoding is greedy.
    """
    document = read_json_if_there(folder, GENERATION_FILE)
    given = parse_section(_GenerationConfig, document, folder / GENERATION_FILE)
    asked = [name for name in ("top_k", "top_p", "seed") if getattr(options, name) is not None]
    samples = bool(given.do_sample) or bool({"top_k", "top_p"} & set(asked))
    if options.temperature is not None:
        samples = options.temperature > 0
    if asked and not samples:
        raise UsageError(
            f"--{asked[0].replace('_', '-')} applies only to sampling", hint="add --temperature 1 to sample"
        )
    ends = _first(given.eos_token_id, eos)
    temperature = _first(options.temperature, given.temperature, 1.0)
    if samples and temperature == 0:
        raise CheckpointError("has do_sample with temperature 0", where=folder / GENERATION_FILE)
    return Decoding(
        temperature=temperature if samples else 0.0,
        top_k=_first(options.top_k, given.top_k, DEFAULT_TOP_K) if samples else 0,
        top_p=_first(options.top_p, given.top_p, 1.0) if samples else 1.0,
        seed=options.seed or 0,
        max_new_tokens=_first(options.max_new_tokens, given.max_new_tokens, DEFAULT_TOKENS),
        ends=frozenset((ends,) if isinstance(ends, int) else ends or ()),
        stops=_checked_stops(options.stop),
        ignored=tuple(
            name
            for name, neutral in NOT_APPLIED.items()
            if document.get(name) is not None and document[name] not in neutral
        ),
    )


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def _checked_stops(stops: tuple[str, ...]) -> tuple[str, ...]:
    if "" in stops:
        raise UsageError("--stop must not be empty")
    return stops
