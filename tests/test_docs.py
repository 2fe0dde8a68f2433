"""The pages: links and anchors, the list of pages, and that each warning of the package is in troubleshooting."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import dllm_compile

from .test_packaging import PAGES, ROOT, files

DOCS = ROOT / "docs"
SITE = ROOT / ".mkdocs.yml"
SAID = ("warnings.warn", "GraphRefused", "TokensUnseen", "Refused", "self.warning", "self.batch.run_whole")
LEAST = 12
"""Letters of the longest fixed part of a text; one with fewer is made of texts that are collected where they are."""


def fixed(node: ast.expr) -> list[str]:
    """The parts of a text that are always the same."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        return [each.value for each in node.values if isinstance(each, ast.Constant)]
    if isinstance(node, ast.BinOp):
        return fixed(node.left) + fixed(node.right)
    return fixed(node.body) + fixed(node.orelse) if isinstance(node, ast.IfExp) else []


def texts(path: Path) -> Iterator[str]:
    """The longest fixed part of each warning, and of each reason to refuse, in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        given: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in SAID:
            given = node.args[:1]
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in (*SAID, "reason"):
            given = [node.value]
        for each in given:
            found = max(fixed(each), key=len, default="").removeprefix("dllm: ")
            if len(found) >= LEAST:
                yield plain(found)


def plain(text: str) -> str:
    """Without line breaks and signs of Markdown."""
    return " ".join(text.replace("`", "").split())


@pytest.mark.parametrize("path", [p for p in files() if any(texts(p))], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_each_warning_is_in_troubleshooting(path: Path) -> None:
    page = plain((DOCS / "troubleshooting.md").read_text())
    assert [text for text in texts(path) if text not in page] == []


def test_the_reader_of_warnings_reads_every_spelling(tmp_path: Path) -> None:
    lines = ["warnings.warn('dllm: as it is, always')", "warnings.warn(f'dllm: with {1} in its midst')"]
    lines += ["raise GraphRefused('a reason of its own', node)", "reason = 'a reason that is named first'"]
    lines += ["x = GraphRefused(f'{1} one of ' + 'two parts of a text')", "warnings.warn(reason)"]
    (tmp_path / "it.py").write_text("\n".join(lines))
    wanted = ["as it is, always", "in its midst", "a reason of its own", "a reason that is named first"]
    assert sorted(texts(tmp_path / "it.py")) == sorted([*wanted, "two parts of a text"])
    assert sum(len([*texts(path)]) for path in files()) > 60


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)]\([^)]*\)", r"\1", heading).lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Anchors of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_anchors_of_links_are_there(page: Path) -> None:
    lost = []
    for link, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text()):
        to = page.parent / link if link else page
        if "://" not in link and to.suffix == ".md" and anchor not in anchors(to):
            lost.append(f"{link}#{anchor}")
    assert lost == []


def test_the_site_has_every_page_once() -> None:
    named = re.findall(r"[\w/-]+\.md", SITE.read_text().partition("\nnav:")[2].partition("\nmarkdown_extensions:")[0])
    here = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(named) == sorted([*here, *site_hooks().ALONG.values()])


def test_the_interface_lists_all_that_the_package_offers() -> None:
    told = re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE)
    assert set(dllm_compile.__all__) - {"Options", "dllm"} <= set(told)  # names of a backend and of its options
    assert len(told) == len(set(told))


def site_hooks() -> ModuleType:
    """The module that mkdocs reads beside the pages."""
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "site_hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("folder", "text", "wanted"),
    [
        ("docs", "[a](options.md) [b](#here)", "[a](options.md) [b](#here)"),
        (".", "[a](docs/options.md#presets)", "[a](options.md#presets)"),
        ("docs", "[README](../README.md) [r](../records/README.md#on)", "[README](readme.md) [r](records.md#on)"),
        ("records", "[it](../docs/measuring.md) ![p](a.png)", "[it](measuring.md) `records/a.png`"),
        ("docs", "[unmask.py](../passes/unmask.py) [it](../a/b.py)", "`passes/unmask.py` it (`a/b.py`)"),
        ("docs", "[web](https://x.org/a)", "[web](https://x.org/a)"),
    ],
)
def test_links_lead_to_pages_of_the_site(folder: str, text: str, wanted: str) -> None:
    assert site_hooks().linked(text, folder) == wanted
