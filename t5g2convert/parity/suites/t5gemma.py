"""The checks of a T5Gemma that was converted from Gemma 2."""

from collections.abc import Mapping
from typing import Any, Final

from t5g2convert.checkpoint.families import gemma2, t5gemma
from t5g2convert.checkpoint.families.gemma2 import Gemma2
from t5g2convert.checkpoint.families.t5gemma import read_t5gemma
from t5g2convert.checkpoint.file_names import TOKENIZER_FILES
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.parity.checks.config import SHARED, flatten, generation_faults, judge_settings
from t5g2convert.parity.checks.cross_attention import judge_first_generation
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.checks.tokenizer import judge_copied_files, template_names
from t5g2convert.parity.replay import replay_conversion
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.session import Shared, Verification
from t5g2convert.parity.source_models import Gemma2Source
from t5g2convert.parity.suites.base import (
    NO_TOKENIZER,
    Suite,
    conversion_remarks,
    integrity,
    on_source_settings,
    provenance,
)
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.t5gemma import T5GemmaReference


def _config(verification: Verification[Gemma2Source]) -> Check:
    source, changes = verification.source, verification.new_values
    expected = dict(flatten(expected_config(source.gemma.model, changes)))
    expected |= {path: value for path, value in changes.items() if path in expected and "." in path}
    faults = generation_faults(source.generation_folder, verification.output, source.gemma.model.text)
    return judge_settings(expected, verification.target, faults, changes)


def _tokenizer(verification: Verification[Gemma2Source]) -> Check | Skipped:
    source = verification.source.folders.source
    files = {} if verification.manifest is None else verification.manifest.files
    names = [name for name in TOKENIZER_FILES if name in files or is_there(verification.output / name)]
    names += template_names(files, source, verification.output)
    return judge_copied_files(names, source, verification.target) if names else NO_TOKENIZER


@Shared
def _parities(verification: Verification[Gemma2Source]) -> tuple[tuple[Check, Check, Check], tuple[str, ...]]:
    """decoder_parity, encoder_parity and cross_parity, from one walk through the layers, and remarks on them."""
    verification.require_tensors()
    gemma = Gemma2Reference(verification.source.checkpoint, **verification.reading(rounded=True))
    target = verification.target
    settings = read_t5gemma(on_source_settings(target, verification.changes), target.path / "config.json")
    model = T5GemmaReference(target, model=settings, **verification.reading())
    batch = verification.inputs.batch(model)
    checks = judge_first_generation(
        gemma, model, batch, tolerance=verification.tolerance, progress=verification.progress
    )
    return checks, batch.remarks


def _decoder_parity(verification: Verification[Gemma2Source]) -> Check:
    checks, remarks = _parities(verification)
    return checks[0].remarked(remarks)


def _encoder_parity(verification: Verification[Gemma2Source]) -> Check:
    return _parities(verification)[0][1]


def _cross_parity(verification: Verification[Gemma2Source]) -> Check:
    return _parities(verification)[0][2]


def _runs(verification: Verification[Gemma2Source]) -> Check:
    verification.require_tensors()
    return judge_runs(T5GemmaReference(verification.target, **verification.reading()), progress=verification.progress)


def expected_config(source: Gemma2, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json of the target, without `dtype`."""
    values = {**source.values, **{name: value for name, value in changes.items() if name != "dtype"}}
    tied = {"tie_word_embeddings": values["tie_word_embeddings"]}
    rope = {"rope_type": "linear", "rope_theta": values["rope_theta"], "factor": values["rope_factor"]}
    stack = {name: values[name] for name in SHARED} | tied
    stack |= {"model_type": "t5_gemma_module", "dropout_rate": 0.0, "rope_parameters": rope}
    top = ("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "vocab_size")
    return {
        "architectures": ["T5GemmaForConditionalGeneration"],
        "model_type": "t5gemma",
        "is_encoder_decoder": True,
        "classifier_dropout_rate": 0.0,
        "dropout_rate": 0.0,
        **tied,
        **{name: values[name] for name in top},
        "encoder": {**stack, "is_decoder": False},
        # transformers enables the decoder's cache and takes its memory's width from the encoder, whatever is set here.
        "decoder": {
            **stack, "is_decoder": True, "use_cache": True, "cross_attention_hidden_size": values["hidden_size"],
        },
    }  # fmt: skip


TO_T5GEMMA: Final = Suite(
    sources=(gemma2.MODEL_TYPE,),
    targets=(t5gemma.MODEL_TYPE,),
    open_source=Gemma2Source,
    read_config=read_t5gemma,
    replay=replay_conversion,
    checks={
        "integrity": integrity,
        "provenance": provenance,
        "config": _config,
        "tokenizer": _tokenizer,
        "decoder_parity": _decoder_parity,
        "encoder_parity": _encoder_parity,
        "cross_parity": _cross_parity,
        "runs": _runs,
    },
    remarks=conversion_remarks,
)
"""A T5Gemma: both stacks are Gemma 2's, and cross-attention starts as Gemma 2's self-attention."""
