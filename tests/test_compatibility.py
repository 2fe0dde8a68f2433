"""The table of models: a few of its rows, and that the page has those that the command lists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dllm_compile.bench import compatibility
from dllm_compile.bench.compatibility import BEGIN, CANVAS, CLASSES, COLUMNS, END, OWN, SAMPLERS, Row, main, rows, write

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
DENSE = {"first_k_dense_replace": 2}
HERE = tuple(name for name in SAMPLERS if name != "LLaDA2Pipeline")


def table(text: str) -> list[list[str]]:
    """Cells of the lines of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def check(name: str, samplers: tuple[str, ...]) -> None:
    """See that all layers of a class are cached under each sampler, and that results equal eager's."""
    found = [*rows(name, samplers, "eager")]
    assert [row.sampler for row in found] == [*samplers]
    for row in found:
        assert (row.cached, row.layers, row.dtype, row.same, row.remark) == (2, 2, "float64", True, "")
        if row.sampler == "generate":  # its step returns tokens alone
            assert row.error is None
        else:
            assert row.error is not None
            assert row.error < 1e-9


def test_a_model_is_cached_and_equals_eager() -> None:
    check("LlamaForCausalLM", HERE)


def test_keys_that_are_copied_into_a_buffer_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek V3 without experts, which compute in float32."""
    monkeypatch.setitem(CLASSES, "DeepseekV3ForCausalLM", {**CLASSES["DeepseekV3ForCausalLM"], **DENSE})
    check("DeepseekV3ForCausalLM", ("own loop",))


def test_a_loop_that_is_not_compiled_is_told_apart() -> None:
    (row,) = rows("DiffusionGemmaForBlockDiffusion", HERE, "eager")
    assert (row.sampler, row.cached, row.error) == (OWN, 0, None)
    assert row.remark


def test_a_model_that_stays_causal_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CLASSES, "LlamaForCausalLM", {**CLASSES["LlamaForCausalLM"], "is_causal": True})
    (row,) = rows("LlamaForCausalLM", HERE, "eager")
    assert "causal" in row.remark
    assert row.error is None


def test_a_folder_is_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import BertConfig

    config = BertConfig(**CLASSES["BertForMaskedLM"])
    config.architectures = ["BertForMaskedLM"]
    config.save_pretrained(tmp_path / "mine")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nbehind\n")
    main(["--model", str(tmp_path / "mine"), "--sampler", "own loop", "--write", str(page)])
    (cells,) = table(capsys.readouterr().out)
    assert cells[:4] == ["mine", "own loop", "2 of 2", "float64"]
    assert float(cells[4]) < 1e-9
    assert cells[5:] == ["yes", ""]
    text = page.read_text()
    assert (text[:7], text[-7:]) == ("before\n", "behind\n")
    assert "old" not in text
    assert table(text) == [cells]


def test_a_wrong_logit_is_seen() -> None:
    """The error is of what the loop was given, and of the masks alone."""
    model = compatibility.build("BertForMaskedLM")
    ids = torch.tensor([[7, 8, compatibility.MASK, compatibility.MASK]])

    def moved(row: int) -> float:
        def call(ids: torch.Tensor) -> object:
            out = model(ids)
            out.logits[:, row, 3] += 0.5
            return out

        beside = compatibility.Beside(model)
        beside.call, beside.compares = call, True
        with torch.no_grad():
            beside(ids)
        return beside.error

    assert moved(2) == pytest.approx(0.5)
    assert moved(0) == 0


def test_mistakes_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "LlamaForCausalML"])
    assert "did you mean" in capsys.readouterr().err
    (tmp_path / "page.md").write_text("nothing")
    with pytest.raises(ValueError, match="has no lines"):
        write(str(tmp_path / "page.md"), "")


def test_cells_cannot_end_early() -> None:
    assert table(compatibility.print_table([Row("a", "b", remark=compatibility._tidy("x|y\n z"))])) == [
        ["a", "b", "", "", "", "", "x\\|y z"]
    ]


def test_the_page_has_the_rows_that_the_command_lists() -> None:
    inside = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    found = table(inside)
    assert {len(cells) for cells in found} == {len(COLUMNS)}
    wanted = [(name, s) for name, settings in CLASSES.items() for s in ([OWN] if settings is CANVAS else SAMPLERS)]
    told = [(cells[0], cells[1]) for cells in found]
    assert set(told) <= {*wanted, *((name, "") for name in CLASSES)}
    assert list(dict.fromkeys(name for name, _ in told)) == [*CLASSES]
    assert len(told) == len(set(told))
    for cells in found:
        assert cells[5] in ("yes", "")
        assert "**" not in "".join(cells)
