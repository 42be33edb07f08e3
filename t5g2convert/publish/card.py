"""The model card of a folder: its metadata."""

import json
from pathlib import Path

from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.errors import UsageError


def model_card(folder: Path, *, repo: str, source_card: str | None, existing: str | None, mode: str) -> str | None:
    """The text of README.md for a folder that this tool wrote.

    Args:
        folder: The folder.
        repo: The model of the Hub that it goes to.
        source_card: README.md of the checkpoint that it was made of.
        existing: README.md that is there already.
        mode: `update` keeps what `existing` says, `replace` does not, `keep` makes no card.

    Returns:
        The card; None to leave what is there.

    Raises:
        CheckpointError: The folder has no manifest, or a damaged one.
        UsageError: There is no such mode.
    """
    if mode not in {"update", "replace", "keep"}:
        raise UsageError(f"unknown mode {mode!r} for the card", hint="update, replace or keep")
    if mode == "keep" or (mode == "update" and existing is not None):
        return None
    source = read_manifest(folder)["source"].get("hub")
    base = [] if source is None else [f"base_model: {json.dumps(source['repo'])}"]
    return "\n".join(["---", "library_name: transformers", *base, "---", "", f"# {repo}", ""])
