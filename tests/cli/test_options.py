"""Options models on the command line, and how their values are parsed."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from t5g2convert.checkpoint.hub.open_and_fetch import Origin
from t5g2convert.cli.options import with_options
from t5g2convert.command_options import CommandOptions, Option
from t5g2convert.conversion import option_values
from t5g2convert.errors import UsageError
from tests.cli.commandline import CommandLine
from tests.processes.small_shards import SMALLEST_FOR_USERS


@pytest.mark.parametrize("size", ["1", "5", "500", "30KB", "0.9M", "999999", "976KiB"])
def test_a_shard_below_1_mb_is_exit_2_and_says_how_sizes_are_written(
    t5g2: CommandLine, demo_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    monkeypatch.setattr(option_values, "SMALLEST_SHARD", SMALLEST_FOR_USERS)
    for command in (
        ["plan", demo_source],
        ["convert", demo_source, tmp_path / "out"],
        ["extract", demo_source, tmp_path / "out", "--part", "encoder"],
    ):
        result = t5g2(*command, "--max-shard-size", size)
        assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
        assert f"{size!r} is below the minimum, 1 MB" in result.err
        assert "use a form like 5G, 500MB or 4GiB" in result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5G", 5 * 10**9),
        ("5g", 5 * 10**9),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("5GiB", 5 * 2**30),
        ("5gib", 5 * 2**30),
        ("5Gi", 5 * 2**30),
        ("500M", 500 * 10**6),
        ("500MB", 500 * 10**6),
        ("500 MiB", 500 * 2**20),
        ("1.5G", 1_500_000_000),
        ("1MB", 10**6),
        ("1000K", 10**6),
        ("1000000", 10**6),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes_are_decimal_with_b_and_binary_with_ib(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option_values, "SMALLEST_SHARD", SMALLEST_FOR_USERS)
    assert SMALLEST_FOR_USERS == 10**6
    assert option_values.parse_shard_size(text) == size


class EverythingOptions(CommandOptions):
    steps: Annotated[int, Option("Steps.")]
    times: Annotated[int, Field(ge=1, le=9), Option("How often.")] = 1
    rate: Annotated[float | None, Field(allow_inf_nan=False), Option("A rate.", default="none")] = None
    loud: Annotated[bool, Option("Shout.")] = False
    careful: Annotated[bool, Option("Take care.")] = True
    hashing: Annotated[bool, Option("Hash.", flag="--hash/--no-hash")] = True
    source: Annotated[Origin | None, Option("A source.", metavar="SOURCE")] = None
    path: Annotated[Path | None, Option("A path.", group="Files")] = None
    mode: Annotated[Literal["a", "b"], Option("A mode.")] = "a"
    names: Annotated[tuple[str, ...], Option("Names.")] = ()
    size: Annotated[int, Option("A size.", flag="--max-size", parse=lambda text: int(text[:-1]), default="5G")] = 5
    python: str = "only"


def run(*arguments: str, **choice: Any) -> tuple[int, str, list[Any]]:
    seen: list[Any] = []

    @with_options(**choice)
    def command(name: str, options: EverythingOptions, extra: bool = False) -> None:
        """Do it."""
        seen.extend([name, options, extra])

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command)
    done = CliRunner().invoke(app, list(arguments))
    if isinstance(done.exception, UsageError):
        raise done.exception
    return done.exit_code, done.output, seen


def test_a_command_gets_its_options_as_one_model() -> None:
    assert run("n", "--steps", "3") == (0, "", ["n", EverythingOptions(steps=3), False])
    every = ["--times", "2", "--rate", "0.5", "--loud", "--no-careful", "--no-hash", "--source", "org/name"]
    every += ["--path", "p", "--mode", "b", "--names", "x", "--names", "y", "--max-size", "7G", "--extra"]
    assert run("n", "--steps", "3", *every)[2] == [
        "n",
        EverythingOptions(
            steps=3, times=2, rate=0.5, loud=True, careful=False, hashing=False, source="org/name", path=Path("p"),
            mode="b", names=("x", "y"), size=7,
        ),
        True,
    ]  # fmt: skip


def test_help_comes_from_the_model() -> None:
    _, text, _ = run("--help")
    text = " ".join(text.split())
    assert "Do it." in text
    for said in (
        "--steps <int> Steps. [required]", "How often. [default: 1; 1<=x<=9]", "A rate. [default: (none)]",
        "--loud Shout.", "--careful / --no-careful Take care. [default: careful]", "--hash / --no-hash Hash.",
        "--source SOURCE A source.", "--names", "A size. [default: 5G]", "--extra",
    ):  # fmt: skip
        assert said in text
    assert "--python" not in text
    assert "--no-loud" not in text


def test_a_command_may_offer_some_of_the_options() -> None:
    assert "No such option" in run("n", "--steps", "3", "--loud", omit={"loud"})[1]
    assert "No such option" in run("n", "--steps", "3", "--loud", only={"steps"})[1]
    assert run("n", "--steps", "3", only={"steps"})[2] == ["n", EverythingOptions(steps=3), False]


def test_the_model_refuses_values_that_typer_accepts() -> None:
    assert run("n", "--steps", "3", "--times", "10")[0] == 2
    with pytest.raises(UsageError, match="rate: Input should be a finite number"):
        run("n", "--steps", "3", "--rate", "nan")
