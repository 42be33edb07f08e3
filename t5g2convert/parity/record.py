"""The result of a verification, written into the folder's own manifest."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from t5g2convert.checkpoint.manifest import MANIFEST_FILE, seal
from t5g2convert.parity.report import Report

KEY: Final = "verification"


def record_report(report: Report, manifest: Mapping[str, Any]) -> Report:
    """Put the result into the manifest, in one rename; the report says so if that cannot be done."""
    path = report.output / MANIFEST_FILE
    staged = path.with_name(f".{MANIFEST_FILE}.{os.getpid()}")
    if path.is_symlink():
        # A folder of the Hub's cache: its files are shared, and are not this tool's to write.
        return replace(report, remarks=(*report.remarks, f"the result was not written: {MANIFEST_FILE} is a link"))
    try:
        try:
            fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            with os.fdopen(fd, "wb") as file:
                file.write(seal({**manifest, KEY: report.record()}))
                file.flush()
                os.fsync(file.fileno())
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    except OSError as error:
        remark = f"the result could not be written into {MANIFEST_FILE}: {error.strerror}"
        return replace(report, remarks=(*report.remarks, remark))
    return report
