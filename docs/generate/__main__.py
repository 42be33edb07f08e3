"""`python -m docs.generate`: write all pages."""

from docs.generate import pages

for path, text in pages().items():
    path.write_text(text, encoding="utf-8")
