"""One folder of each kind that can have a card, with a recorded verification."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert import convert
from t5g2convert.adaptation.merge import merge
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest, seal
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.cli.demo import DEMO_CONFIG, build_demo_source
from t5g2convert.conversion.convert import execute
from t5g2convert.conversion.options import WriteOptions
from t5g2convert.conversion.trained_model import plan_adapted
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.adaptation.adapters import write_adapter
from tests.adaptation.runs import FACTS

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

KINDS: Final = (
    "images",
    "text",
    "grafted",
    "encoder",
    "encoder-text",
    "decoder",
    "decoder-text",
    "paired",
    "t5gemma",
    "adapted",
    "merged",
)


def write_kinds(folder: Path) -> None:
    """Write a folder of each kind; return them by name."""
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
    (folder / "gemma2").mkdir()
    softcaps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    text = {**DEMO_CONFIG["text_config"], "model_type": "gemma2", **softcaps}
    write_synthetic_source(folder / "gemma2", find_map("gemma2").map, text, seed=0)
    convert(folder / "gemma2", folder / "t5gemma", flush=False)
    layers: dict[str, Any] = {"encoder_layers": "first:7", "decoder_layers": "0:8:2"}
    convert(folder / "gemma-text", folder / "paired", flush=False, decoder_from=folder / "gemma-text", **layers)
    write_adapted(folder / "images", folder / "adapted")
    write_adapter(folder / "images", folder / "lora", target_modules=["q_proj"])
    merge(folder / "adapted", folder / "lora", folder / "merged")
    for kind in KINDS:
        change_manifest(folder / kind, lambda manifest: manifest.update(verification=RECORD))


def write_adapted(model: Path, output: Path) -> None:
    """Write a model with trained text stacks: the mean of three checkpoints."""
    names = {name: stored for name, stored in open_checkpoint(model).tensors.items() if ".layers.0.mlp." in name}
    names = {name: stored for name, stored in names.items() if "vision_tower" not in name}
    shapes = {name: stored.entry.shape for name, stored in names.items()}
    plan = plan_adapted(open_checkpoint(model), shapes, {**FACTS, "checkpoints": [60, 80, 100]})
    execute(plan, Folders(model), output, WriteOptions(flush=False), values=Zeros(shapes))


@dataclass(frozen=True)
class Zeros:
    """Return values that are all zero."""

    names: Mapping[str, tuple[int, ...]]

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Return one piece."""
        yield np.zeros(self.names[name], np.float32)


def change_manifest(folder: Path, change: Callable[[Document], object]) -> None:
    """Change a manifest and reseal it."""
    manifest = read_manifest(folder).document()
    change(manifest)
    (folder / MANIFEST_FILE).write_bytes(seal(manifest))


def from_hub(repo: str = "org/gemma-3", revision: str = COMMIT) -> Callable[[Document], object]:
    """Return the change that makes the source a Hub model."""
    return lambda manifest: manifest["source"].update(hub={"repo": repo, "revision": revision})
