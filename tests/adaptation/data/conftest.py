"""The model that data is packed for."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(demo_model: Path) -> Path:
    """The demo's T5Gemma 2; do not change it."""
    return demo_model
