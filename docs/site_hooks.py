"""MkDocs hooks: the documents in the repository's root are pages of the site, too.

Links are written so that they work in the repository. Those between the root and docs/ are rewritten here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "CHANGELOG.md": "changelog.md",
    "LOG.md": "log.md",
}


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the root documents, with links that begin at docs/ instead of the root."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, its_page in PAGES.items():
            text = text.replace(f"]({other}", f"]({its_page}")
        text = re.sub(r"^\[中文\].*\n", "", text, flags=re.MULTILINE)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ for a root document, as `../../CONTRIBUTING.md`, to its page."""
    for name, page in PAGES.items():
        markdown = markdown.replace(f"](../../{name}", f"](../{page}")
    return markdown


def on_page_content(html: str, **_: Any) -> str:
    """Show a bar that is escaped in a table's cell without its backslash, as code hosts do."""
    return re.sub(r"<td>.*?</td>", lambda cell: cell[0].replace("\\|", "|"), html, flags=re.DOTALL)
