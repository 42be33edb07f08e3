"""`python -m t5g2convert`."""

import signal
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line; until it can clean up after a signal, a signal ends the process silently."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from t5g2convert.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
