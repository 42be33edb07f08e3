"""What a folder's manifest has of its verification, as a card shows it."""

from collections.abc import Iterator
from pathlib import Path

from t5g2convert.checkpoint.families.config_section import ConfigSection, Number, parse_section
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest
from t5g2convert.publish.markdown import code, table


class _Check(ConfigSection):
    name: str
    passed: bool
    detail: str


class Verification(ConfigSection):
    """A recorded verification; the manifest leaves its parts to whoever reads them."""

    passed: bool
    dtype: str | None
    device: str
    tolerance: Number
    checks: list[_Check]
    skipped: dict[str, str]
    remarks: list[str]

    @property
    def held(self) -> bool:
        """Whether every check that was made passed, and one was."""
        return self.passed and bool(self.checks) and all(check.passed for check in self.checks)


def read_verification(manifest: Manifest, folder: Path) -> Verification | None:
    """The verification that a manifest has; None if the folder was not verified.

    Raises:
        CheckpointError: It is not what a verification records.
    """
    found = manifest.verification
    return None if found is None else parse_section(Verification, found, folder / MANIFEST_FILE, "verification")


def unrecorded() -> str:
    """What a card says of a folder that has no manifest to record a verification in, in Markdown."""
    return (
        "**Not recorded.** `t5g2 verify FOLDER --source START` tells what of it has moved, how far, and whether "
        "settings, tokens and the vision tower are still those of what was trained."
    )


def shown(verification: Verification | None) -> Iterator[str]:
    """The verification in Markdown, a paragraph or block at a time."""
    if verification is None:
        yield "**Not verified.** `t5g2 verify OUTPUT --source SOURCE` compares it with its source and keeps the result."
        return
    verdict = "Verified" if verification.held else "**Verification failed: do not use this.** It was made"
    exact = (
        "no difference was let pass"
        if verification.tolerance == 0
        else f"differences up to {verification.tolerance:g} passed"
    )
    where = "" if verification.dtype is None else f" in {code(verification.dtype)} on {code(verification.device)}"
    yield f"{verdict} against its source by `t5g2 verify`, which computes both models itself{where}; {exact}."
    rows = [
        [code(check.name), "passed" if check.passed else "**FAILED**", code(check.detail)]
        for check in verification.checks
    ]
    rows += [[code(name), "not made", code(because)] for name, because in verification.skipped.items()]
    yield table(["check", "result", "what was compared and found"], rows)
    if verification.remarks:
        yield "\n".join(f"- {code(remark)}" for remark in verification.remarks)
