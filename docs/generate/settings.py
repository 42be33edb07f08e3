"""The tables of docs/settings.md, from the list of known settings."""

from docs.generate.tables import table
from t5g2convert.checkpoint.families.known_settings import CONFIG_SECTIONS, EVERY_CONFIG, GENERATION, PAGE, TOKENIZER
from t5g2convert.checkpoint.families.setting_rules import Section, Setting


def settings_tables() -> str:
    """Return a table for each section of each file; settings of every section of config.json are listed once."""
    shared = Section("Every section of config.json", EVERY_CONFIG, "transformers")
    own = [
        Section(section.title, tuple(it for it in section.settings if it not in EVERY_CONFIG), section.owner)
        for section in CONFIG_SECTIONS
    ]
    words = table(("outcome", "meaning"), PAGE.items())
    return "\n".join([words, *(_section(section) for section in (*own, shared, GENERATION, TOKENIZER))])


def _section(section: Section) -> str:
    rows: dict[tuple[str, str], list[str]] = {}
    for setting in section.settings:
        rows.setdefault((str(setting.outcome), setting.because), []).append(_name(setting))
    cells = ((", ".join(names), outcome, because) for (outcome, because), names in rows.items())
    return f"### {section.title}\n\n{table(('setting', 'treatment', 'why'), cells)}"


def _name(setting: Setting) -> str:
    name = setting.name if " " in setting.name else f"`{setting.name}`"
    neutral = ", ".join(f"`{_json(value)}`" for value in setting.neutral)
    return f"{name} ({neutral})" if neutral else name


def _json(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value).replace("'", '"')
