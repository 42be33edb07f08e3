"""Folders that a card can be made of, one of each kind, with a recorded verification."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from t5g2convert import convert
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal
from t5g2convert.cli.demo import DEMO_CONFIG, build_demo_source
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source

Document = dict[str, Any]

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"

RECORD: Final[Document] = {
    "passed": True,
    "dtype": "bfloat16",
    "device": "cpu",
    "tolerance": 0.0,
    "checks": [{"name": "decoder_parity", "passed": True, "detail": "logits with hidden memory: difference 0"}],
    "skipped": {"tokenizer": "the output has no tokenizer"},
    "remarks": ["computed on the settings of the source"],
}

KINDS: Final = ("images", "text", "grafted", "encoder", "encoder-text", "decoder", "decoder-text", "t5gemma")


def write_kinds(folder: Path) -> None:
    """Write a folder of each kind, by its name."""
    build_demo_source(folder / "gemma-images")
    (folder / "gemma-text").mkdir()
    write_synthetic_source(folder / "gemma-text", find_map("gemma3").map, DEMO_CONFIG["text_config"], seed=0)
    convert(folder / "gemma-images", folder / "images", flush=False)
    convert(folder / "gemma-text", folder / "text", flush=False)
    convert(
        folder / "gemma-text", folder / "grafted", flush=False, vision_from=folder / "gemma-images", projector="zeros"
    )
    for part in ("encoder", "decoder"):
        convert(folder / "images", folder / part, flush=False, part=part)
        convert(folder / "text", folder / f"{part}-text", flush=False, part=part)
    for kind in KINDS[:-1]:
        change_manifest(folder / kind, lambda manifest: manifest.update(verification=RECORD))
    shutil.copytree(folder / "text", folder / "t5gemma")
    (folder / "t5gemma/config.json").write_text(json.dumps({"model_type": "t5gemma"}))
    change_manifest(folder / "t5gemma", _first_generation)


def change_manifest(folder: Path, change: Callable[[Document], object]) -> None:
    """Change a manifest, and seal it again."""
    manifest = read_manifest(folder)
    change(manifest)
    (folder / MANIFEST_FILE).write_bytes(seal(manifest))


def from_hub(repo: str = "org/gemma-3", revision: str = COMMIT) -> Callable[[Document], object]:
    """The change that makes the source a model of the Hub."""
    return lambda manifest: manifest["source"].update(hub={"repo": repo, "revision": revision})


def _first_generation(manifest: Document) -> None:
    manifest["source"].update(family="gemma2")
    manifest["mapping"].update(name="gemma2")
    del manifest["verification"]
