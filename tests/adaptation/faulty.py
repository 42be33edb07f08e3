"""`t5g2` with a second process that does not find an image."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.data.image_columns import ImageSource
from t5g2convert.adaptation.ul2 import dataset
from t5g2convert.cli.main import main
from t5g2convert.errors import DataError


def _lost(images: Sequence[ImageSource], model: Path) -> Any:
    raise DataError("no such file", where=str(images[0]))


if __name__ == "__main__":
    if os.environ.get("LOCAL_RANK") == "1":
        dataset.pixel_values = _lost
    main(sys.argv[1:])
