"""The result of a verification, written into the folder's own manifest."""

from dataclasses import replace

from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest
from t5g2convert.parity.reports.report import Report


def record_report(report: Report, manifest: Manifest) -> Report:
    """Put the result into the manifest, in one rename; the report says so if that cannot be done."""
    path = report.output / MANIFEST_FILE
    if path.is_symlink():
        # A folder of the Hub's cache: its files are shared, and are not this tool's to write.
        return replace(report, remarks=(*report.remarks, f"the result was not written: {MANIFEST_FILE} is a link"))
    try:
        replace_file(path, manifest.with_verification(report.record()).encode())
    except OSError as error:
        remark = f"the result could not be written into {MANIFEST_FILE}: {error.strerror}"
        return replace(report, remarks=(*report.remarks, remark))
    return report
