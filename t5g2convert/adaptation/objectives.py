"""The objectives of training: how their settings are read from run.json."""

from typing import Annotated, Any

from pydantic import PlainValidator

from t5g2convert.adaptation.pairs.settings import PAIRS, PairSettings
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.errors import UsageError


def read_settings(document: Any) -> RunSettings:
    """Return the settings of a run, of the class of their objective: only UL2 has none named.

    Raises:
        ValueError: A setting is missing, unknown or not valid.
    """
    if not isinstance(document, dict):
        raise ValueError("expected an object")
    kind = PairSettings if document.get("objective") == PAIRS else Settings
    try:
        return kind(**document)
    except UsageError as error:
        raise ValueError(error.message) from None


AnySettings = Annotated[RunSettings, PlainValidator(read_settings)]
"""Settings of one of the objectives, as a field."""
