import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

import t5g2convert
from t5g2convert.cli.main import COMMANDS

PACKAGE = Path(t5g2convert.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# The packages that each package may import, besides itself; add new ones here. Only `cli` may import all.
LEAVES = {"command_options", "errors", "interrupts", "printable", "progress", "version"}
BELOW = {
    "command_options": {"errors"},
    "errors": {"printable"},
    "interrupts": {"errors"},
    "printable": set[str](),
    "progress": set[str](),
    "version": set[str](),
    "checkpoint": LEAVES,
    "mapping": LEAVES | {"checkpoint"},
    "conversion": LEAVES | {"checkpoint", "mapping"},
    "reference": LEAVES | {"checkpoint"},
    "parity": LEAVES | {"checkpoint", "reference"},
    "publish": LEAVES | {"checkpoint", "mapping", "conversion"},
    "adaptation": LEAVES | {"checkpoint", "mapping", "conversion", "reference"},
    "__init__": LEAVES | {"checkpoint", "mapping", "conversion", "reference", "parity"},
    "__main__": {"cli"},
    "cli": LEAVES | {"checkpoint", "mapping", "conversion", "reference", "parity", "publish", "adaptation"},
}

HEAVY = {"torch", "transformers", "numpy", "huggingface_hub"}


def imported_modules(text: str) -> Iterator[str]:
    """Return dotted names of all imports of a module, including those in functions and `if TYPE_CHECKING`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(text: str) -> set[str]:
    names = (name.split(".") for name in imported_modules(text))
    found = {parts[1] for parts in names if parts[0] == "t5g2convert" and len(parts) > 1}
    return {name for name in found if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()}


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def calls_of(text: str, name: str) -> list[int]:
    calls = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]


def modules_after(arguments: list[str], folder: Path) -> set[str]:
    """Return the top-level modules loaded after a successful command."""
    return {name.partition(".")[0] for name in loaded_after(arguments, folder)}


def loaded_after(arguments: list[str], folder: Path) -> set[str]:
    """Return the dotted names of all modules loaded after a successful command."""
    script = (
        "import json, sys\n"
        "from t5g2convert.cli.main import main\n"
        "code = 99\n"
        "try:\n    main(sys.argv[2:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "open(sys.argv[1], 'w').write(json.dumps([code, sorted(sys.modules)]))\n"
    )
    report = folder / "modules.json"
    subprocess.run([sys.executable, "-c", script, str(report), *arguments], check=True, capture_output=True)
    code, modules = json.loads(report.read_text())
    assert code == 0
    return set(modules)


def test_every_exported_name_is_there() -> None:
    assert len(set(t5g2convert.__all__)) == len(t5g2convert.__all__)
    assert list(t5g2convert.__all__) == sorted(t5g2convert.__all__)
    assert {"convert", "plan", "inspect", "Plan", "Conversion", "Inspection", "T5g2Error"} <= set(t5g2convert.__all__)
    for name in t5g2convert.__all__:
        assert getattr(t5g2convert, name) is not None
    assert set(t5g2convert.__all__) <= set(dir(t5g2convert))


def test_exported_names_say_the_same_to_a_type_checker_as_at_run_time() -> None:
    text = (PACKAGE / "__init__.py").read_text()
    checked = next(
        node for node in ast.parse(text).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    homes = {
        alias.asname or alias.name: (f"{node.module}", alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(homes) | {"__version__"} == set(t5g2convert.__all__)
    for name, (module, attribute) in homes.items():
        assert getattr(import_module(module), attribute) is getattr(t5g2convert, name)


def test_a_name_that_is_not_exported_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'verfy'"):
        _ = t5g2convert.verfy


def test_every_error_has_the_exit_code_of_the_table() -> None:
    codes = {name: getattr(t5g2convert, name).exit_code for name in t5g2convert.__all__ if name.endswith("Error")}
    assert codes == {
        "T5g2Error": 1,
        "UsageError": 2,
        "CheckpointError": 3,
        "MappingError": 4,
        "DataError": 3,
        "OutputError": 5,
        "VerificationError": 6,
        "HubError": 7,
        "MachineError": 8,
    }


def test_type_information_ships() -> None:
    assert (files("t5g2convert") / "py.typed").is_file()


def test_the_import_reader_sees_every_kind_of_import() -> None:
    text = (
        "import t5g2convert.cli\ndef f():\n    from t5g2convert import errors\nfrom t5g2convert.mapping.schema import x"
    )
    assert imported_rooms(text) == {"cli", "errors", "mapping"}


def test_imports_follow_the_data() -> None:
    # Verification shares no code with the converter, except for the check that replays the plan.
    provenance = {*(PACKAGE / "parity/checks").glob("provenance*.py"), PACKAGE / "parity/replay.py"}
    found = {}
    for path in SOURCES:
        replays = {"conversion"} if path in provenance else set()
        if upwards := imported_rooms(path.read_text()) - {room(path)} - BELOW[room(path)] - replays:
            found[path.relative_to(PACKAGE).as_posix()] = upwards
    assert found == {}


def test_the_lazy_exports_follow_the_data_too() -> None:
    assert {home.partition(".")[0] for home in t5g2convert._HOME.values()} <= BELOW["__init__"]


def test_only_the_command_line_imports_the_command_line() -> None:
    importers = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if "cli" in imported_rooms(path.read_text())}
    assert {path for path in importers if not path.startswith("cli/")} == {"__main__.py"}


def test_nothing_imports_transformers() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if "transformers" in {name.partition(".")[0] for name in imported_modules(path.read_text())}
    }
    assert importers == set()


def test_the_package_itself_is_cheap_to_import() -> None:
    script = "import sys, t5g2convert; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "t5g2convert" in loaded
    assert not loaded & (HEAVY | {"pydantic", "yaml", "typer", "rich"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["convert", "--help"],
        ["adapt", "--help"],
        ["inspect", "SOURCE"],
        ["inspect", "SOURCE", "--json", "--tensors"],
        ["plan", "SOURCE"],
        ["plan", "SOURCE", "--tensors", "--dtype", "float32"],
        ["mappings", "list"],
        ["mappings", "show", "gemma3"],
        ["mappings", "check", "gemma3", "--against", "SOURCE"],
        ["mappings", "schema"],
    ],
    ids=" ".join,
)
def test_a_command_loads_no_heavy_library(arguments: list[str], demo_source: Path, tmp_path: Path) -> None:
    places = {"SOURCE": str(demo_source), "OUTPUT": str(tmp_path / "out")}
    assert not modules_after([places.get(item, item) for item in arguments], tmp_path) & HEAVY


@pytest.mark.parametrize(
    ("arguments", "commands", "rooms"),
    [
        (["--version"], set[str](), set[str]()),
        (["--help"], set[str](), set[str]()),
        (["inspect", "SOURCE"], {"inspect"}, {"checkpoint", "mapping"}),
        (["plan", "SOURCE"], {"plan"}, {"checkpoint", "mapping", "conversion"}),
        (["mappings", "list"], {"mappings"}, {"checkpoint", "mapping"}),
        (["convert", "--help"], {"convert", "upload", "verify"}, {"checkpoint", "conversion", "parity", "reference"}),
        (["adapt", "--help"], {"adapt"}, {"checkpoint", "mapping", "conversion", "adaptation"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_loads_its_own_module_and_the_rooms_that_it_needs(
    arguments: list[str], commands: set[str], rooms: set[str], demo_source: Path, tmp_path: Path
) -> None:
    names = loaded_after([str(demo_source) if item == "SOURCE" else item for item in arguments], tmp_path)
    modules = {name.replace("-", "_") for name in COMMANDS}
    assert {name for name in modules if f"t5g2convert.cli.{name}" in names} == commands
    assert {name for name in BELOW["cli"] - LEAVES if f"t5g2convert.{name}" in names} == rooms


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_version_and_the_list_of_commands_need_typer_alone(option: str, tmp_path: Path) -> None:
    assert not modules_after([option], tmp_path) & (HEAVY | {"pydantic", "yaml", "rich"})


@pytest.mark.parametrize("options", [[], ["--no-hash", "--json"], ["--dtype", "float32"]], ids=" ".join)
def test_a_conversion_loads_numpy_and_still_no_torch(options: list[str], demo_source: Path, tmp_path: Path) -> None:
    arguments = ["convert", "--no-verify", str(demo_source), str(tmp_path / "out"), *options]
    assert modules_after(arguments, tmp_path) & HEAVY == {"numpy"}


@pytest.mark.parametrize("arguments", [["card", "OUTPUT"], ["card", "OUTPUT", "--write"]])
def test_a_card_loads_no_heavy_library(arguments: list[str], demo_source: Path, tmp_path: Path) -> None:
    t5g2convert.convert(demo_source, tmp_path / "out", flush=False)
    arguments = [str(tmp_path / "out") if item == "OUTPUT" else item for item in arguments]
    assert not modules_after(arguments, tmp_path) & HEAVY


def test_the_error_path_loads_no_heavy_library_either(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "t5g2convert", "inspect", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert run.returncode == 3
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in run.stderr.splitlines() if "|" in line}
    assert "typer" in imported
    assert not imported & HEAVY


def test_no_file_has_an_unspecific_name() -> None:
    checkout = PACKAGE.parent
    searched = [path for folder in ("t5g2convert", "tests", "examples") for path in (checkout / folder).rglob("*.py")]
    assert len(searched) >= len(SOURCES) > 0
    assert [path for path in searched if path.stem.strip("_") in {"utils", "util", "common", "helpers", "misc"}] == []


def test_only_the_command_line_prints_or_exits() -> None:
    found = {
        path.relative_to(PACKAGE).as_posix(): lines
        for path in SOURCES
        if room(path) != "cli" and (lines := calls_of(path.read_text(), "print") + calls_of(path.read_text(), "exit"))
    }
    assert found == {}
    assert calls_of("def f():\n    print(1)", "print") == [2]


def test_only_the_command_line_writes_to_standard_streams() -> None:
    pattern = {"stdout", "stderr"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in SOURCES
        if room(path) != "cli"
        and any(
            isinstance(node, ast.Attribute) and node.attr in pattern for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert found == set()


def test_a_module_is_at_most_350_lines_long() -> None:
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 350} == {}


def test_a_module_has_a_docstring() -> None:
    without = [path for path in SOURCES if not ast.get_docstring(ast.parse(path.read_text()))]
    assert [path.name for path in without] in ([], ["version.py"])
