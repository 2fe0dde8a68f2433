"""The page of ``explain --html``: it stands alone, is well formed, and shows what ``explain`` and the loop found."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch

from dllm_compile import explain
from dllm_compile.bench import heat
from dllm_compile.debug import Ran
from dllm_compile.explain import Explanation
from dllm_compile.page import page

from . import models, small_model

VOID = {"meta", "br", "hr", "img"}


class Reader(HTMLParser):
    """Checks that elements are closed in order; keeps each with its attributes, and texts by element."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))


@cache
def found() -> tuple[Explanation, list[Ran]]:
    """What ``explain`` and a loop found of a small model of two layers."""
    model, options = small_model.build(), {"method": "dllm-cache", "prompt_interval": 3, "response_interval": 2}
    ids = torch.full((1, 14), models.MASK)
    ids[:, :6] = 1
    return explain(model, ids, mask_id=models.MASK, **options), heat.ran(model, ids, models.MASK, 4, options)


def read(title: str = "a < b", **more: Any) -> tuple[Reader, str]:
    """The page, read and as text."""
    explanation, ran = found()
    text = page(title, more.get("explanation", explanation), more.get("ran", ran))
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader, text


def test_it_stands_alone() -> None:
    reader, text = read()
    names = {name for _, attributes in reader.elements for name in attributes}
    assert names.isdisjoint({"src", "href", "onload", "onclick"})
    assert {tag for tag, _ in reader.elements}.isdisjoint({"script", "link", "img", "iframe"})
    assert [outside for outside in ("http", "url(", "@import") if outside in text] == []


def test_every_value_of_a_layer_has_its_row_set_in_every_kind_of_step() -> None:
    explanation, ran = found()
    reader, _ = read()
    titles = [text for tag, text in reader.texts if tag == "title"]
    for values in explanation.layers.values():
        assert {"all", "selected"} <= {rows for value in values for rows in value.rows.values()}
        for value in values:
            assert [*value.rows] == [*explanation.variants]
            assert all(f"{value.name} in {name}: {rows}" in titles for name, rows in value.rows.items())
    arcs = sum(tag == "path" for tag, _ in reader.elements)
    inside = {value.name for values in explanation.layers.values() for value in values}
    assert arcs == sum(n in inside for values in explanation.layers.values() for v in values for n in v.reads) > 0
    drawn = [title for title in titles if re.fullmatch(r"step \d+ \(.+\), layer \d+: \d+ rows a sequence", title)]
    assert len(drawn) == sum(len(step.computed) for step in ran) == 2 * len(ran)
    assert f"step {ran[1].number} ({ran[1].name}), layer 1: {ran[1].computed[1]} rows a sequence" in drawn


def test_the_costs_are_those_of_explain() -> None:
    explanation, _ = found()
    cells = [text for tag, text in read()[0].texts if tag == "td"]
    for name, share in explanation.relative.items():
        assert name in cells
        assert f"{share:.3f}" in cells


def test_a_terminal_gets_a_table_that_says_the_same() -> None:
    explanation, _ = found()
    console = rich.console.Console(file=io.StringIO(), width=200)
    with console.capture() as capture:
        console.print(explanation)
    shown, said = capture.get(), str(explanation)
    for name, variant in explanation.variants.items():
        cells = [name, variant.query.name, variant.key.name, variant.value.name, f"{explanation.relative[name]:.3f}"]
        assert cells in [re.findall(r"[\w.+]+", line) for line in shown.splitlines()]
        assert cells in [line.split() for line in said.splitlines()]
    for line in (*explanation.graphs, f"state bytes = {explanation.state_bytes}", "S = 14 (tokens of each)"):
        assert line in shown
        assert line in said


def test_what_formulas_are_made_of_is_said() -> None:
    explanation, _ = found()
    read_by = {symbol.name for formula in explanation.flops.values() for symbol in formula.free_symbols}
    said = [re.fullmatch(r"(\w+) = (\d+) \(.+\)", line) for line in explanation.meanings()]
    assert {match[1]: int(match[2]) for match in said if match} == {n: explanation.lengths[n] for n in read_by}


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
MEASURED = """<script>
const drawn = [...document.querySelectorAll("svg")].map(each => {
  const box = each.getBBox(), size = each.getBoundingClientRect();
  return [-box.x, -box.y, box.x + box.width - size.width, box.y + box.height - size.height];
});
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.body.replaceChildren(JSON.stringify({ wide, drawn }));
</script>"""
"""In place of a page, how much wider it is than the window, and how far each drawing reaches beyond its four sides."""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_all_of_it(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(read("a long title " * 20)[1] + MEASURED)
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,700", f"--user-data-dir={tmp_path}"]
    done = subprocess.run(
        [str(BROWSER), *flags, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=600, check=True
    )
    found = json.loads(done.stdout.partition("<body>")[2].partition("</body>")[0])
    assert found["wide"] <= 0
    assert len(found["drawn"]) == 2
    assert max(map(max, found["drawn"])) <= 0


def test_text_is_escaped() -> None:
    reader, text = read("<script>alert(1)</script>")
    assert "<script>" not in text
    assert ("h1", "<script>alert(1)</script>") in reader.texts


def test_a_model_that_is_not_cached_has_a_page_that_says_why() -> None:
    reader, _ = read(explanation=Explanation(refused=["it is causal"]), ran=[])
    assert ("pre", "it is causal") in reader.texts
    assert not any(tag == "svg" for tag, _ in reader.elements)
