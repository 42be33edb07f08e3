"""Make the pages and the parts of pages that tell what the code says itself; `make docs` runs it, a test compares.

    docs/commands/NAME.md       from the help of each command, with the examples below
    docs/commands/README.md     the list of them
    docs/README.md              the list of all pages, from their titles and first sentences
    docs/weight-map.md          the reference, from the schema of maps and the families
    docs/architecture.md        the packages and their modules, from their docstrings
    docs/adaptation.md          what training costs, from the shapes of the released sizes
    docs/settings.md            what becomes of every setting, from the list of the known ones
    docs/ci.md                  inputs and outputs of the parity action, from action.yml

A part stands between `<!-- NAME: made by make docs -->` and `<!-- end of NAME -->`; all else is written by hand.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import yaml
from typer.main import get_command

from docs.generate.commands import command_page
from docs.generate.cost import cost_table
from docs.generate.settings import settings_tables
from docs.generate.tables import first_sentence, table
from docs.generate.weight_map import weight_map_reference
from t5g2convert.cli.main import app

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"


def pages() -> dict[Path, str]:
    """Every file that is made, whole, and its text."""
    root: Any = get_command(app)
    made = {DOCS / f"commands/{name}.md": command_page(name, command) for name, command in root.commands.items()}
    parts: dict[str, Callable[[], str]] = {
        "commands/README.md": lambda: table(
            ("command", "what it does"),
            ((f"[`t5g2 {name}`]({name}.md)", first_sentence(it.help)) for name, it in root.commands.items()),
        ),
        "weight-map.md": weight_map_reference,
        "architecture.md": packages,
        "ci.md": action_tables,
        "adaptation.md": cost_table,
        "settings.md": settings_tables,
        "README.md": page_list,
    }
    return made | {DOCS / name: _filled(DOCS / name, make()) for name, make in parts.items()}


def _filled(path: Path, part: str) -> str:
    """A page with its part made anew."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"<!-- (.+): made by make docs -->\n", text)
    assert found, f"{path} has no part that is made"
    end = f"<!-- end of {found[1]} -->\n"
    assert text.count(end) == 1, f"{path} lacks {end}"
    return f"{text[: found.end()]}\n{part.strip()}\n\n{text[text.index(end) :]}"


def packages() -> str:
    """Each package with its modules, by the first line of their docstrings."""
    rows: list[tuple[str, str]] = []
    for init in sorted((ROOT / "t5g2convert").glob("*/**/__init__.py")):
        rows.append((f"**{init.parent.relative_to(ROOT / 't5g2convert')}/**", f"**{_first_line(init)}**"))
        modules = sorted(path for path in init.parent.glob("*.py") if path != init)
        rows.extend((f"[{path.name}](../{path.relative_to(ROOT)})", _first_line(path)) for path in modules)
    return table(("module", "subject"), iter(rows))


def _first_line(path: Path) -> str:
    """The first paragraph of a module's docstring."""
    said = re.match(r'"""(.*?)(?:"""|\n\n)', path.read_text(encoding="utf-8"), re.DOTALL)
    assert said, f"{path} has no docstring"
    return " ".join(said[1].split())


def action_tables() -> str:
    """What goes into the parity action, and what comes out."""
    action = yaml.safe_load((ROOT / ".github/actions/parity/action.yml").read_text(encoding="utf-8"))
    inputs = []
    for name, it in action["inputs"].items():
        without = "required" if it.get("required") else it["default"] and f"`{it['default']}`"
        inputs.append((f"`{name}`", it["description"], without))
    outputs = ((f"`{name}`", it["description"]) for name, it in action["outputs"].items())
    return table(("input", "", "without it"), inputs) + "\n" + table(("output", ""), outputs)


def page_list() -> str:
    """The pages of this folder, by their titles and first sentences."""
    rows = []
    for path in sorted([*DOCS.glob("*.md"), DOCS / "commands/README.md"]):
        if path == DOCS / "README.md":
            continue
        title, _, rest = path.read_text(encoding="utf-8").partition("\n")
        told = first_sentence(rest.strip().partition("\n\n")[0])
        rows.append((f"[{title.removeprefix('# ')}]({path.relative_to(DOCS)})", told))
    return table(("page", "what it tells"), iter(rows))
