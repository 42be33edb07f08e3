"""Rows of a data set of the Hub, or of a folder that the datasets library reads."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.data.documents import imported
from t5g2convert.adaptation.data.messages import without_nulls
from t5g2convert.adaptation.data.rows import Columns, Row, row_of
from t5g2convert.checkpoint.hub.hub_errors import network_error, without_token
from t5g2convert.errors import DataError, T5g2Error
from t5g2convert.interrupts import raise_interruption


def read_dataset(name: str, split: str, columns: Columns | str, subset: str | None = None) -> Iterator[Row]:
    """Stream the rows of a data set of the Hub, or of a folder that the datasets library reads.

    Args:
        name: `org/name`, or a folder.
        split: For example `train`.
        columns: The columns that decide the form of a row; a name is that of the text of documents.
        subset: Configuration, if the data set has several.

    Raises:
        DataError: The library cannot read it, or it lacks the columns.
        HubError: The Hub does not have it, denies access, or cannot be reached.
        UsageError: The library is not installed.
    """
    datasets = imported("datasets")
    columns = Columns(text=columns) if isinstance(columns, str) else columns
    where = f"{name}[{split}]"
    try:
        datasets.disable_progress_bars()
        # Its messages about retries contain addresses.
        datasets.logging.set_verbosity(logging.CRITICAL)
        loaded = _with_encoded_images(datasets.load_dataset(name, subset, split=split, streaming=True), datasets)
        folder = Path(name) if Path(name).exists() else None
        for number, row in enumerate(loaded, 1):
            if not columns.fitting(row):
                raise DataError(columns.absence(row, "column "), where=where)
            values = {column: without_nulls(value) for column, value in row.items()}
            yield row_of(f"{where}:{number}", values, columns, folder)
    except T5g2Error:
        raise
    except Exception as error:  # noqa: BLE001 - the library and the readers below it raise anything
        raise_interruption()
        raise _dataset_error(error, name, where, datasets) from None


def _with_encoded_images(loaded: Any, datasets: Any) -> Any:
    """Return a data set with the bytes of its images, also of those in messages, instead of decoded pixels."""
    for name, feature in (loaded.features or {}).items():
        if (encoded := _encoded(feature, datasets)) != feature:
            loaded = loaded.cast_column(name, encoded)
    return loaded


def _encoded(feature: Any, datasets: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, dict):
        return {name: _encoded(each, datasets) for name, each in feature.items()}
    if isinstance(feature, list):
        return [_encoded(each, datasets) for each in feature]
    if (inner := getattr(feature, "feature", None)) is not None and (encoded := _encoded(inner, datasets)) != inner:
        return type(feature)(encoded)
    return feature


def _dataset_error(error: Exception, name: str, where: str, datasets: Any) -> T5g2Error:
    """Translate an error of the datasets library; for a data set of the Hub, its text is not repeated.

    It quotes servers, which may quote the token.
    """
    local = Path(name).exists()
    absent = "no such folder, and no such data set on the Hub"
    if (known := network_error(error, name if local else f"datasets/{name}", absent=absent)) is not None:
        return known
    text = " ".join(without_token(str(error)).split())
    if local:
        return DataError(f"cannot be read as a data set: {text or type(error).__name__}", where=where)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return DataError(absent, where=where)
    # Names of splits and configurations do not come from a server.
    names = ", ".join(re.findall(r"'([\w.-]{1,60})'", text.partition("[")[2])) or "the splits listed on its Hub page"
    if "Unknown split" in text:
        return DataError("has no such split", where=where, hint=f"--split takes one of {names}")
    if "Config name is missing" in text or "BuilderConfig" in text:
        reason = "has several configurations, or none with that name"
        return DataError(reason, where=where, hint=f"--subset takes one of {names}")
    return DataError(f"cannot be read as a data set ({type(error).__name__})", where=where)
