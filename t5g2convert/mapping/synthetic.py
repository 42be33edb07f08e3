"""Synthetic source checkpoints: every tensor that a map needs for a config, with seeded random weights or none.

The demo and the benchmarks convert such folders. With `seed=None` the files are sparse and take no space, so a model of
any size can be planned.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import INDEX_FILE, weight_files
from t5g2convert.checkpoint.header import TensorEntry, encode_header, tensor_bits
from t5g2convert.mapping.name_patterns import expand
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.source_families import FAMILIES

BLOCK_ELEMENTS: Final = 1 << 22
"""Maximum number of random numbers to draw; larger tensors repeat them, each from another position."""


def write_synthetic_source(
    folder: Path,
    weight_map: WeightMap,
    config: Mapping[str, Any],
    *,
    seed: int | None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a bfloat16 checkpoint folder that the map accepts, in the first spelling of each root.

    Args:
        folder: An existing folder.
        weight_map: The map; its rows define the tensors.
        config: config.json of the source, written unchanged.
        seed: Seed of the weights (normal, standard deviation 0.05); None leaves holes that read as zeros.
        max_shard_bytes: Largest size of one file's tensors, in bytes.
    """
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    files: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    room = max_shard_bytes
    for name, shape in source_tensors(weight_map, config):
        size = tensor_bits("BF16", shape) // 8
        if files[-1] and size > room:
            files.append([])
            room = max_shard_bytes
        files[-1].append((name, shape))
        room -= size
    index: dict[str, str] = {}
    for number, (name, tensors) in enumerate(zip(weight_files(len(files)), files, strict=True), start=1):
        _write_file(folder / name, tensors, None if seed is None else seed + number)
        index |= {tensor: name for tensor, _ in tensors}
    if len(files) > 1:
        (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2) + "\n")


def source_tensors(weight_map: WeightMap, config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor that a map needs from a source with this config."""
    model = FAMILIES[config["model_type"]].read(config, Path("config.json"))
    layout = {root: spellings[0] for root, spellings in weight_map.roots.items()}
    if "text_only" in model.features:
        # The published text-only models use this spelling; the first spelling is the multimodal models'.
        layout["text"] = "model."
    for row in weight_map.weights:
        if row.from_ is None or not row.op.carries or not row.applies(model.features):
            continue
        shape = tuple(model.dims[size] if isinstance(size, str) else size for size in row.shape)
        for _, name in expand(row.from_, layout, model.dims):
            yield name, shape


def _write_file(path: Path, tensors: list[tuple[str, tuple[int, ...]]], seed: int | None) -> None:
    entries: list[TensorEntry] = []
    position = 0
    for name, shape in tensors:
        size = tensor_bits("BF16", shape) // 8
        entries.append(TensorEntry(name, "BF16", shape, position, position + size))
        position += size
    header = encode_header(entries)
    with path.open("wb") as file:
        file.write(header)
        if seed is None:
            os.ftruncate(file.fileno(), len(header) + position)
            return
        block = _random_block(seed, min(BLOCK_ELEMENTS, max(entry.elements for entry in entries)))
        for number, entry in enumerate(entries):
            start = 2 * (number * 7919 % (len(block) // 2))
            todo = entry.nbytes
            while todo:
                piece = block[start : start + todo]
                file.write(piece)
                todo -= len(piece)
                start = 0


def _random_block(seed: int, elements: int) -> memoryview:
    import ml_dtypes
    import numpy as np

    numbers = np.random.default_rng(seed).standard_normal(elements, dtype=np.float32) * np.float32(0.05)
    return memoryview(numbers.astype(ml_dtypes.bfloat16).view(np.uint8).data)
