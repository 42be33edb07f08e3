"""The pages and parts of pages that are generated from the code; `make docs` writes them, and a test compares them.

    docs/commands/NAME.md       each command, from its help
    docs/commands/README.md     the list of them
    docs/README.md              the list of all pages, from their titles and first sentences
    docs/weight-map.md          the reference, from the schema of maps and the families
    docs/architecture.md        the packages and their modules, from their docstrings
    docs/adaptation.md          the cost of training, from the shapes of the released sizes
    docs/adding-a-family.md     the files that Gemma 2 took, with their lines
    docs/settings.md            every known setting, from their list
    docs/ci.md                  inputs and outputs of the parity action, from action.yml

A generated part is between `<!-- NAME: made by make docs -->` and `<!-- end of NAME -->`; the rest is written by hand.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

import yaml

from docs.generate.commands import command_page
from docs.generate.cost import cost_table
from docs.generate.family import family_table
from docs.generate.settings import settings_tables
from docs.generate.tables import first_sentence, table
from docs.generate.weight_map import weight_map_reference
from t5g2convert.cli.command import load
from t5g2convert.cli.main import COMMANDS

ROOT: Final = Path(__file__).resolve().parents[2]
DOCS: Final = ROOT / "docs"


def pages() -> dict[Path, str]:
    """Return the complete text of every generated file."""
    commands = {name: load(name) for name in COMMANDS}
    made = {DOCS / f"commands/{name}.md": command_page(name, command) for name, command in commands.items()}
    parts: dict[str, Callable[[], str]] = {
        "commands/README.md": lambda: table(
            ("command", "what it does"),
            ((f"[`t5g2 {name}`]({name}.md)", first_sentence(it.help)) for name, it in commands.items()),
        ),
        "weight-map.md": weight_map_reference,
        "architecture.md": packages,
        "ci.md": action_tables,
        "adaptation.md": cost_table,
        "adding-a-family.md": family_table,
        "settings.md": settings_tables,
        "README.md": page_list,
    }
    return made | {DOCS / name: _filled(DOCS / name, make()) for name, make in parts.items()}


def _filled(path: Path, part: str) -> str:
    """Return a page with its generated part replaced."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r"<!-- (.+): made by make docs -->\n", text)
    assert found, f"{path} has no generated part"
    end = f"<!-- end of {found[1]} -->\n"
    assert text.count(end) == 1, f"{path} lacks {end}"
    return f"{text[: found.end()]}\n{part.strip()}\n\n{text[text.index(end) :]}"


def packages() -> str:
    """Return the table of packages and modules, with the first lines of their docstrings."""
    rows: list[tuple[str, str]] = []
    for init in sorted((ROOT / "t5g2convert").glob("*/**/__init__.py")):
        rows.append((f"**{init.parent.relative_to(ROOT / 't5g2convert')}/**", f"**{_first_line(init)}**"))
        modules = sorted(path for path in init.parent.glob("*.py") if path != init)
        rows.extend((f"[{path.name}](../{path.relative_to(ROOT)})", _first_line(path)) for path in modules)
    return table(("module", "subject"), iter(rows))


def _first_line(path: Path) -> str:
    """Return the first paragraph of a module's docstring."""
    found = re.match(r'"""(.*?)(?:"""|\n\n)', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"{path} has no docstring"
    return " ".join(found[1].split())


def action_tables() -> str:
    """Return the tables of inputs and outputs of the parity action."""
    action = yaml.safe_load((ROOT / ".github/actions/parity/action.yml").read_text(encoding="utf-8"))
    inputs = []
    for name, it in action["inputs"].items():
        without = "required" if it.get("required") else it["default"] and f"`{it['default']}`"
        inputs.append((f"`{name}`", it["description"], without))
    outputs = ((f"`{name}`", it["description"]) for name, it in action["outputs"].items())
    return table(("input", "", "without it"), inputs) + "\n" + table(("output", ""), outputs)


def page_list() -> str:
    """Return the list of pages, with their titles and first sentences."""
    rows = []
    for path in sorted([*DOCS.glob("*.md"), DOCS / "commands/README.md"]):
        if path == DOCS / "README.md":
            continue
        title, _, rest = path.read_text(encoding="utf-8").partition("\n")
        sentence = first_sentence(rest.strip().partition("\n\n")[0])
        rows.append((f"[{title.removeprefix('# ')}]({path.relative_to(DOCS)})", sentence))
    return table(("page", "contents"), iter(rows))
