"""`t5g2` with a SIGKILL at the worst moment: a checkpoint is written and flushed, but not yet renamed."""

import os
import signal
import sys
from pathlib import Path

from t5g2convert.adaptation.train import checkpoints
from t5g2convert.cli.main import main

flush_folder = checkpoints.flush_folder


def _flush_or_die(folder: Path) -> None:
    flush_folder(folder)
    if folder.name == os.environ["KILLED_AT"]:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    checkpoints.flush_folder = _flush_or_die
    main(sys.argv[1:])
