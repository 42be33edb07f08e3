"""The weight maps that ship with the tool, and the choice of the map for a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.schema import MapHeader
from t5g2convert.mapping.strictyaml import load_yaml
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean, load_map


def mappings_folder() -> Path:
    """Return `mappings` of the installed package, or of the checkout that the package runs from.

    Raises:
        MappingError: Neither exists: the installation is broken.
    """
    package = Path(__file__).resolve().parent.parent
    if (package / "mappings").is_dir():
        return package / "mappings"
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "mappings").is_dir():
        return checkout / "mappings"
    raise MappingError("the shipped mappings are missing", where=package, hint="reinstall t5g2convert")


def shipped_paths() -> dict[str, Path]:
    """Return the files of the shipped maps by name, in alphabetical order."""
    return {path.stem: path for path in sorted(mappings_folder().glob("*.yaml"))}


def shipped_maps() -> list[LoadedMap]:
    """Load all shipped maps, in alphabetical order."""
    return [load_map(path) for path in shipped_paths().values()]


def find_map(name: str) -> LoadedMap:
    """Load a shipped map by its name, or any map by the path of its file.

    Raises:
        MappingError: The map does not exist, or is faulty.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return load_map(Path(name))
    paths = shipped_paths()
    if name not in paths:
        hint = did_you_mean(name, paths) or f"shipped: {', '.join(paths)}; your own file needs its .yaml suffix"
        raise MappingError(f"unknown mapping {name!r}", hint=hint)
    return load_map(paths[name])


def is_shipped(path: Path) -> bool:
    """Return whether a file is one of the shipped maps."""
    return mappings_folder() in path.parents


def map_for(config: Mapping[str, Any], where: Path, *, extracts: str | None = None) -> LoadedMap:
    """Load the shipped map for a source's config; read only the first lines of the other maps.

    Args:
        config: config.json of the source.
        where: Its path, for errors.
        extracts: The part to extract from an encoder-decoder; None to convert a whole model.

    Raises:
        CheckpointError: There is no shipped map for this kind of model and part.
        MappingError: The map is faulty.
    """
    headers = {path: _read_header(path) for path in shipped_paths().values()}
    suitable = {path: header.source.model_type for path, header in headers.items() if header.extracts == extracts}
    for path, model_types in suitable.items():
        if config.get("model_type") in model_types:
            return load_map(path)
    convertible = ", ".join(name for model_types in suitable.values() for name in model_types)
    done, do = ("converted", "convert") if extracts is None else (f"taken apart for its {extracts}", "take apart")
    raise CheckpointError(
        f"{describe_model_type(config)} cannot be {done}; the shipped mappings {do} {convertible or 'none'}",
        where=where,
    )


def _read_header(path: Path) -> MapHeader:
    """Read the head of a map, before its rows; a faulty map raises the same error as loading it."""
    head = load_yaml(path, until="weights").data
    try:
        return MapHeader.model_validate(head)
    except ValidationError:
        loaded = load_map(path).map
        return MapHeader(extracts=loaded.extracts, source=loaded.source)
