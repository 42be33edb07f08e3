import inspect
from collections.abc import Callable
from typing import Annotated

import pytest
from pydantic import Field

from t5g2convert.command_options import CommandOptions, Option, takes_options
from t5g2convert.errors import UsageError


class GreetOptions(CommandOptions):
    times: Annotated[int, Field(ge=1), Option("How often to greet.")] = 1
    loud: Annotated[bool, Option("Greet in capitals.")] = False
    seen: Callable[[str], None] | None = None


@takes_options(GreetOptions)
def greet(name: str, options: GreetOptions) -> str:
    """Greet someone."""
    text = " ".join([f"hello {name}"] * options.times)
    return text.upper() if options.loud else text


def test_a_function_takes_the_fields_as_keyword_arguments() -> None:
    assert greet("Ada") == "hello Ada"
    assert greet("Ada", times=2, loud=True) == "HELLO ADA HELLO ADA"
    assert greet.__doc__ == "Greet someone."


def test_its_signature_has_the_fields() -> None:
    assert str(inspect.signature(greet)) == (
        "(name: str, *, times: int = 1, loud: bool = False, "
        "seen: collections.abc.Callable[[str], None] | None = None) -> str"
    )


def test_an_unknown_keyword_is_a_type_error_as_anywhere() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'tmies'"):
        greet("Ada", tmies=2)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="too many positional arguments"):
        greet("Ada", 2)  # type: ignore[misc, arg-type, call-arg]


def test_all_wrong_values_are_named_in_one_usage_error() -> None:
    with pytest.raises(UsageError, match=r"^times: Input should be greater .*; loud: Input should be a valid boolean$"):
        greet("Ada", times=0, loud="no")  # type: ignore[arg-type]


def test_options_are_frozen_and_strict() -> None:
    options = GreetOptions()
    with pytest.raises(ValueError, match="frozen"):
        options.times = 3  # type: ignore[misc]
    with pytest.raises(UsageError, match="times: Input should be a valid integer"):
        GreetOptions(times="3")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="tiems: Extra inputs are not permitted"):
        GreetOptions(tiems=3)  # type: ignore[call-arg]


def test_a_replaced_value_is_validated() -> None:
    assert GreetOptions(loud=True).replace(times=2) == GreetOptions(loud=True, times=2)
    with pytest.raises(UsageError, match="times"):
        GreetOptions().replace(times=0)
