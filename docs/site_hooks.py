"""What mkdocs does beside: pages outside of ``docs/`` come along, and links to other files become their paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ALONG = {"README.md": "readme.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
ALONG |= {"records/README.md": "records.md"}
"""Files of the checkout by path, and the names of their pages."""
LINK = re.compile(r"(!?)\[([^]]*)]\(([^)#\s:]*)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside."""
    from mkdocs.structure.files import File

    for path, name in ALONG.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=linked(text, str(Path(path).parent))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of ``docs/``."""
    return markdown if page.file.src_uri in ALONG.values() else linked(markdown, "docs")


def linked(text: str, folder: str) -> str:
    """A text whose links lead to pages of the site, or else are the paths of what they led to.

    Args:
        text: Markdown.
        folder: of the checkout, that the links are relative to.
    """

    def to(match: re.Match[str]) -> str:
        shows, said, path, anchor = match.groups()
        if not path:
            return match[0]
        path = os.path.normpath(f"{folder}/{path}")
        page = ALONG.get(path, path.removeprefix("docs/") if path.startswith("docs/") and path.endswith(".md") else "")
        if page:
            return f"[{said}]({page}{anchor or ''})"
        return f"`{path}`" if shows or said == os.path.basename(path) else f"{said} (`{path}`)"

    return LINK.sub(to, text)
