"""How T5Gemma is judged that was made of Gemma 2."""

from collections.abc import Mapping
from typing import Any

from t5g2convert.checkpoint.families import gemma2, t5gemma
from t5g2convert.checkpoint.families.gemma2 import Gemma2
from t5g2convert.checkpoint.families.t5gemma import T5Gemma, read_t5gemma
from t5g2convert.checkpoint.file_names import TOKENIZER_FILES
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.parity.checks.config import SHARED, flatten, judge_settings
from t5g2convert.parity.checks.cross_attention import judge_first_generation
from t5g2convert.parity.checks.generation_config import generation_faults
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.checks.token_ids import token_faults
from t5g2convert.parity.checks.tokenizer import same_bytes, template_names
from t5g2convert.parity.declared_changes import change_remarks, on_source_settings
from t5g2convert.parity.parents import Gemma2Parent
from t5g2convert.parity.reports.report import Check, refused
from t5g2convert.parity.session import Judge
from t5g2convert.parity.suites.base import Kind
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.t5gemma import T5GemmaReference


class ToT5Gemma(Kind[Gemma2Parent]):
    """Gemma 2 to T5Gemma: both stacks are the parent's, cross-attention starts as the parent's self-attention."""

    sources = (gemma2.MODEL_TYPE,)
    targets = (t5gemma.MODEL_TYPE,)
    parities = ("decoder_parity", "encoder_parity", "cross_parity")

    def parent(self, sources: Sources) -> Gemma2Parent:
        """Gemma 2."""
        return Gemma2Parent(sources)

    def read(self, target: Checkpoint) -> T5Gemma:
        """T5Gemma."""
        return read_t5gemma(target.config, target.path / "config.json")

    def against(self, judge: Judge, parent: Gemma2Parent, target: Checkpoint) -> None:
        """config, tokenizer and the parities."""
        judge.make(["config"], lambda: [_config(judge, parent, target)])
        self._tokens(judge, parent, target)
        judge.remarks += change_remarks(target, judge.changes)
        gemma = Gemma2Reference(parent.checkpoint, **judge.reading(rounded=True))
        if judge.unfit(self.parities, target):
            return

        def passes() -> list[Check]:
            settled = read_t5gemma(on_source_settings(target, judge.changes), target.path / "config.json")
            model = T5GemmaReference(target, model=settled, **judge.reading())
            batch = judge.inputs.batch(model)
            return judge_first_generation(gemma, model, batch, tolerance=judge.tolerance, progress=judge.progress)

        judge.make(self.parities, passes)

    def runs(self, judge: Judge, target: Checkpoint) -> Check:
        """Encoder and decoder together."""
        return judge_runs(T5GemmaReference(target, **judge.reading()), progress=judge.progress)

    def _tokens(self, judge: Judge, parent: Gemma2Parent, target: Checkpoint) -> None:
        files = {} if judge.manifest is None else judge.manifest.files
        names = [name for name in TOKENIZER_FILES if name in files or is_there(target.path / name)]
        names += template_names(files, parent.folders.source, target.path)
        if names:
            judge.make(["tokenizer"], lambda: [_files(names, parent, target)])
        else:
            judge.skip(["tokenizer"], "the output has no tokenizer")


def _files(names: list[str], parent: Gemma2Parent, target: Checkpoint) -> Check:
    """tokenizer: the files are the source's, byte for byte."""
    source = parent.folders.source
    faults = [*token_faults(target)]
    faults += [f"{name} is not the source's" for name in names if not same_bytes(name, source, target)]
    if faults:
        return refused("tokenizer", "file(s) or token(s) that are not the source's or have no row", faults)
    return Check("tokenizer", True, f"{', '.join(names)}: the source's")


def _config(judge: Judge, parent: Gemma2Parent, target: Checkpoint) -> Check:
    changes, text = judge.new_values, parent.gemma.model.text
    expected = dict(flatten(expected_config(parent.gemma.model, changes)))
    expected |= {path: value for path, value in changes.items() if path in expected and "." in path}
    faults = generation_faults(parent.writing, target.path, text)
    return judge_settings(expected, target, faults, changes)


def expected_config(source: Gemma2, changes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the target, without `dtype`."""
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
        # transformers has the decoder's cache on, and the width of its memory from the encoder, whatever stands there.
        "decoder": {
            **stack, "is_decoder": True, "use_cache": True, "cross_attention_hidden_size": values["hidden_size"],
        },
    }  # fmt: skip
