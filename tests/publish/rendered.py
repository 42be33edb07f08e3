"""A card as a reader sees it: parsed as Markdown."""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from markdown_it import MarkdownIt

_BLOCK = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True)
class Rendered:
    """A card: its metadata, its headings, links, HTML, code by language, and tables as rows of cells."""

    metadata: dict[str, Any]
    headings: list[str]
    links: list[str]
    html: list[str]
    code: list[tuple[str, str]]
    tables: list[list[list[str]]]
    inline_code: list[str]


def render(card: str) -> Rendered:
    """Parse a card as GitHub and the Hub do: CommonMark with tables, and plain addresses turned into links."""
    front = _BLOCK.match(card)
    assert front is not None
    tokens = MarkdownIt("commonmark").enable("table").parse(card[front.end() :])
    found = Rendered(yaml.safe_load(front[1]), [], [], [], [], [], [])
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            found.headings.append(f"{token.tag} {tokens[place + 1].content}")
        elif token.type == "fence":
            found.code.append((token.info, token.content))
        elif token.type == "html_block":
            found.html.append(token.content)
        elif token.type == "table_open":
            found.tables.append([])
        elif token.type == "tr_open":
            found.tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found.tables[-1][-1].append(tokens[place + 1].content)
        for child in token.children or ():
            if child.type == "link_open":
                found.links.append(str(child.attrs["href"]))
            elif child.type == "html_inline":
                found.html.append(child.content)
            elif child.type == "code_inline":
                found.inline_code.append(child.content)
            elif child.type == "text":
                found.links.extend(re.findall(r"(?:https?://|www\.)\S+|\S+@\S+", child.content))
    return found


def table_lines(card: str) -> list[int]:
    """Return the number of unescaped bars of each table row; code may not hold any either."""
    return [len(re.findall(r"(?<!\\)\|", line)) for line in card.splitlines() if line.startswith("|")]
