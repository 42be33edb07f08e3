"""`python -m t5g2convert`."""

from t5g2convert.cli.main import main

if __name__ == "__main__":
    main()
