"""Export of a trained adapter: a folder as peft writes it, and a record of the training that it came from."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from t5g2convert.adaptation.train.checkpoint_manifest import check_files
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.history import History, check_model, identity, read_history
from t5g2convert.adaptation.train.run_folder import ADAPTER_FOLDER
from t5g2convert.checkpoint.adapter import open_adapter
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.families.config_section import parse_section
from t5g2convert.checkpoint.file_names import ADAPTER_FILE, ADAPTER_RECORD, ADAPTER_WEIGHTS
from t5g2convert.checkpoint.file_store import is_there, sha256_of
from t5g2convert.checkpoint.folder import open_checkpoint, read_json_object, some
from t5g2convert.checkpoint.manifest import FileRecord, ToolRecord, encode_json
from t5g2convert.checkpoint.manifest_section import Digest, Section
from t5g2convert.conversion.output.ownership import ListedFile, is_intact
from t5g2convert.conversion.output.path_rules import check_vacant
from t5g2convert.conversion.output.staging import Staging
from t5g2convert.errors import CheckpointError, OutputError
from t5g2convert.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn


class AdapterRecord(Section):
    """The contents of t5g2_adapter.json.

    Attributes:
        model: Identity of the model that the adapter was trained on, as in run.json.
        step: The step of the exported checkpoint.
        settings_sha256: The sha256 of the run's settings.
        data_sha256: The sha256 of the packed data.
        files: The adapter's files.
    """

    format: Literal[1]
    tool: ToolRecord
    model: Digest
    step: PositiveInt
    settings_sha256: Digest
    data_sha256: Digest
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class ExportedAdapter:
    """The exported adapter of a run.

    Attributes:
        output: Its folder.
        targets: Number of tensors that it changes.
        before: An earlier start of the run had exported it, and nothing was written now.
    """

    output: Path
    targets: int
    before: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the part that `t5g2 finetune --json` prints."""
        before = {"exported_before": True} if self.before else {}
        return {"output": str(self.output), "targets": self.targets, **before}


def read_record(folder: Path) -> AdapterRecord:
    """Read the record of an adapter that this tool wrote.

    Raises:
        CheckpointError: It is missing or not valid.
    """
    path = folder / ADAPTER_RECORD
    return parse_section(AdapterRecord, read_json_object(path), path)


def check_base(adapter: Path, model: Path) -> bool:
    """Refuse a model that an adapter was not trained on; return whether the adapter records its model.

    Raises:
        CheckpointError: The adapter was trained on another model, or its record is not valid.
    """
    if not is_there(adapter / ADAPTER_RECORD):
        return False
    if read_record(adapter).model != identity(model):
        raise CheckpointError(
            f"is not the model that {adapter} was trained on: {ADAPTER_RECORD} has the sha256 of another",
            where=model,
            hint="pass that model, unmodified",
        )
    return True


def adapter_listing(folder: Path) -> Mapping[str, ListedFile]:
    """List the files of an exported adapter, from its record.

    Raises:
        CheckpointError: The record is missing or not valid.
    """
    files = read_record(folder).files
    return {**{name: ListedFile(file.bytes, file.sha256) for name, file in files.items()}, ADAPTER_RECORD: ListedFile()}


def check_adapter_place(run: Path) -> None:
    """Refuse to export into a run if RUN/adapter is not an earlier export of an adapter.

    Raises:
        OutputError: RUN/adapter is something else, or has files of the user in it; they are listed.
    """
    output = run / ADAPTER_FOLDER
    if not os.path.lexists(output):
        return
    try:
        check_vacant(output, overwrite=True, listing=adapter_listing)
    except OutputError as error:
        error.hint = "move it away"
        raise


def export_adapter(run: Path, checkpoint: Path, model: Path) -> ExportedAdapter:
    """Export a checkpoint to RUN/adapter, which appears only if peft finds a place for each of its matrices.

    If this checkpoint was exported before, nothing is written.

    Args:
        run: The run's folder; an earlier export of this run in it is replaced if it was not modified.
        checkpoint: The checkpoint's folder.
        model: The model that the adapter was trained on.

    Raises:
        CheckpointError: The checkpoint or the model is damaged, the model is not the one of the run, or peft does not
            find the places of the matrices.
        OutputError: The output cannot be written, or RUN/adapter is not an export of a run.
    """
    from safetensors.torch import save

    from t5g2convert.adaptation.train.lora import config_of
    from t5g2convert.adaptation.train.model import build_model, names_on_disk

    values, output, history = CheckpointReader(checkpoint), run / ADAPTER_FOLDER, read_history(run)
    check_files(checkpoint, values.manifest)
    check_model(history, model)
    shape = history.settings.adapter
    if shape is None:
        raise CheckpointError("did not train an adapter", where=run)
    if _is_exported(output, history, values.manifest.step):
        return ExportedAdapter(output, len(values.names) // 2, before=True)
    check_adapter_place(run)
    start = open_checkpoint(model)
    network = build_model(model, start.config)
    saved = _saved_names(names_on_disk(network, start), values.names)
    tensors = {saved[name]: values.read(name) for name in values.names}
    with Staging(output, overwrite=True, listing=adapter_listing, last=(ADAPTER_FILE,)) as staging:
        try:
            config = config_of(shape, Path(history.model_folder))
            config.inference_mode = True
            config.save_pretrained(str(staging.folder))
            replace_file(staging.folder / ADAPTER_FILE, (staging.folder / ADAPTER_FILE).read_bytes())
            replace_file(staging.folder / ADAPTER_WEIGHTS, save(tensors, {"format": "pt"}))
            _check_loads(staging.folder, tensors, network)
            files = {
                name: FileRecord(bytes=(staging.folder / name).stat().st_size, sha256=sha256_of(staging.folder / name))
                for name in (ADAPTER_FILE, ADAPTER_WEIGHTS)
            }
            record = AdapterRecord(
                format=1,
                tool=ToolRecord(name="t5g2convert", version=__version__),
                model=history.model,
                step=values.manifest.step,
                settings_sha256=values.manifest.settings_sha256,
                data_sha256=history.data,
                files=files,
            )
            replace_file(staging.folder / ADAPTER_RECORD, encode_json(record.document()))
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=output) from error
        staging.commit()
    return ExportedAdapter(output, len(open_adapter(output).targets))


def _is_exported(output: Path, history: History, step: int) -> bool:
    """Return whether a folder is the unmodified export of this training at this step."""
    try:
        found = read_record(output)
    except CheckpointError:
        return False
    same = (found.model, found.step, found.data_sha256) == (history.model, step, history.data)
    made_with = {history.settings_sha256, *(leg.settings_sha256 for leg in history.earlier)}
    return same and found.settings_sha256 in made_with and is_intact(output, adapter_listing)


def _saved_names(on_disk: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return peft's names of an adapter's matrices, by their names in a checkpoint; peft names the modules."""
    from t5g2convert.adaptation.train.lora import weight_of

    modules = {name: parameter for parameter, name in on_disk.items()}
    return {
        name: f"base_model.model.{modules[weight_of(name)].removesuffix('weight')}{'.'.join(name.split('.')[-2:])}"
        for name in names
    }


def _check_loads(folder: Path, tensors: Mapping[str, "Tensor"], network: "nn.Module") -> None:
    """Refuse an adapter whose settings give peft other matrices than it has; the network is changed.

    Raises:
        CheckpointError: Matrices are missing, unexpected or misshapen.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    config = LoraConfig.from_pretrained(str(folder))
    inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    expected = {f"base_model.model.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]:
        raise CheckpointError(f"does not load in peft: {some(wrong)}", where=folder)
