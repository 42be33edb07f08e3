"""The maps that ship with the tool, and how one is chosen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean, load_map


def mappings_folder() -> Path:
    """`mappings` inside the installed package, or at the top of the checkout that the package runs from.

    Raises:
        MappingError: Neither is there: the installation is broken.
    """
    package = Path(__file__).resolve().parent.parent
    if (package / "mappings").is_dir():
        return package / "mappings"
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "mappings").is_dir():
        return checkout / "mappings"
    raise MappingError("the shipped mappings are missing", where=package, hint="install t5g2convert again")


def shipped_maps() -> list[LoadedMap]:
    """Return all shipped maps, by name."""
    return [load_map(path) for path in sorted(mappings_folder().glob("*.yaml"))]


def find_map(name: str) -> LoadedMap:
    """A shipped map by its name, or any map by the path of its file.

    Raises:
        MappingError: There is no such map, or it is faulty.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return load_map(Path(name))
    paths = {path.stem: path for path in sorted(mappings_folder().glob("*.yaml"))}
    if name not in paths:
        hint = did_you_mean(name, paths) or f"shipped: {', '.join(paths)}; a file of yours needs its .yaml ending"
        raise MappingError(f"there is no mapping {name!r}", hint=hint)
    return load_map(paths[name])


def is_shipped(path: Path) -> bool:
    """Whether a map is one that ships."""
    return mappings_folder() in path.parents


def map_for(config: Mapping[str, Any], where: Path, *, extracts: str | None = None) -> LoadedMap:
    """The shipped map for a source's config.

    Args:
        config: config.json of the source.
        where: Its path, for errors.
        extracts: The part of an encoder-decoder that shall be taken out; None to convert a model whole.

    Raises:
        CheckpointError: No shipped map does that to such a model.
    """
    maps = [loaded for loaded in shipped_maps() if loaded.map.extracts == extracts]
    for loaded in maps:
        if config.get("model_type") in loaded.map.source.model_type:
            return loaded
    convertible = ", ".join(name for loaded in maps for name in loaded.map.source.model_type)
    done, do = ("converted", "convert") if extracts is None else (f"taken apart for its {extracts}", "take apart")
    raise CheckpointError(
        f"{describe_model_type(config)} cannot be {done}; the shipped mappings {do} {convertible or 'none'}",
        where=where,
    )
