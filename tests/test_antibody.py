"""``bench --antiberty`` on a small BERT of random weights, and the sequences, where their tables are installed."""

from __future__ import annotations

import importlib.util
import json
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from dllm_compile.bench import antibody, bench
from dllm_compile.bench.antibody import BEGIN, CHAINS, END, MASK, RESIDUES, SPECIAL, STRETCHES, Batch, fill
from dllm_compile.bench.contest import Contender, Row

needs_tables = pytest.mark.skipif(importlib.util.find_spec("abnumber") is None, reason="abnumber is not installed")
NAMES = [each.name for each in antibody.contenders()]


def small_bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=25, max_position_embeddings=96, type_vocab_size=2, pad_token_id=0, **sizes)
    model: Any = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.weight *= 50.0  # it is sure of some of its answers
    return model  # type: ignore[no-any-return]


def small_batches(count: int, batch: int, seed: int = 0) -> list[Batch]:
    """Random sequences of three lengths, with stretches of as many."""
    draw = random.Random(seed)
    sizes = [((33, 12), (40, 16), (29, 8))[i % 3] for i in range(count // batch)]
    return [
        antibody.masked(["".join(draw.choices(RESIDUES, k=length)) for _ in range(batch)], stretch, draw)
        for length, stretch in sizes
    ]


def test_a_stretch_in_the_middle_of_each_sequence_is_masked() -> None:
    for each in small_batches(6, 2):
        ids, truth, masked = each.job.ids, each.truth, each.masked
        assert bool((masked.sum(1) == each.job.response).all())
        for row in masked:
            first, last = int(row.nonzero()[0]), int(row.nonzero()[-1])
            assert last - first + 1 == each.job.response
            assert min(first, len(row) - 1 - last) > (len(row) - 2 - each.job.response) // 4
        assert torch.equal(ids[~masked], truth[~masked])
        assert bool((truth[:, 0] == BEGIN).all())
        assert bool((truth[:, -1] == END).all())
        assert bool((truth[:, 1:-1] >= SPECIAL).all())


def logits_of(token: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, S, 25]`` by which ``token`` has probability ``sure`` among residues; padding is likelier still."""
    logits = torch.full((*token.shape, 25), -torch.inf).scatter(2, token.unsqueeze(2), sure.log().unsqueeze(2))
    other = SPECIAL + (token - SPECIAL + 1) % len(RESIDUES)
    return logits.scatter(2, other.unsqueeze(2), (1 - sure).log().unsqueeze(2)).index_fill(2, torch.tensor(0), 99.0)


SURE = torch.tensor([[0.1, 0.6, 0.95, 0.8, 0.7, 0.1], [0.1, 0.55, 0.6, 0.75, 0.95, 0.1]])
ORDERS: list[tuple[dict[str, Any], list[list[int]]]] = [
    ({}, [[2], [3], [4], [1]]),
    ({"block": 2}, [[2], [1], [3], [4]]),
    ({"threshold": 0.75}, [[2, 3], [4], [1]]),
    ({"block": 2, "threshold": 0.75}, [[2], [1], [3], [4]]),
    ({"factor": 0.6}, [[2, 3], [4], [1]]),
    ({"delta": 0.25}, [[2, 3], [4], [1]]),
    ({"threshold": 0.9, "fall": 0.9}, [[2], [3, 4], [1]]),
]


@pytest.mark.parametrize(("how", "order"), ORDERS, ids=[str(how) for how, _ in ORDERS])
def test_the_loop_fills_what_its_rule_says(how: dict[str, Any], order: list[list[int]]) -> None:
    """One sequence alone; and with another one, whose masks lie elsewhere, as it is alone."""
    token = torch.arange(6, 18).view(2, 6)
    ids = torch.tensor([[BEGIN, MASK, MASK, MASK, MASK, END], [BEGIN, 9, MASK, MASK, MASK, END]])
    filled = []
    for rows in ([0], [0, 1]):
        x = ids[rows].clone()
        steps, before = [], x == MASK
        for now in fill(lambda _: logits_of(token[rows], SURE[rows]), x, MASK, **how):  # noqa: B023  # called here
            steps.append((before & (now != MASK))[0].nonzero().flatten().tolist())
            before = now == MASK
        filled.append([step for step in steps if step])
        assert torch.equal(x, torch.where(ids[rows] == MASK, token[rows], ids[rows]))
    assert filled == [order, order]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model in place of the trained one, random sequences, short blocks, and no Inductor."""
    every = antibody.contenders

    def quick(each: Contender) -> Contender:
        if each.plain:
            return replace(each, plain=False)
        return each if each.options is None else replace(each, options={**each.options, "lowering": "eager"})

    monkeypatch.setattr(antibody, "contenders", lambda: [quick(each) for each in every()])
    monkeypatch.setattr(antibody, "BLOCK", 8)
    monkeypatch.setattr(antibody, "load", small_bert)
    monkeypatch.setattr(antibody, "batches", small_batches)
    monkeypatch.setattr(antibody, "require", lambda *_: None)


def test_the_command_writes_its_rows(stand_ins: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["eager", "inductor", "dual, one block + threshold", "fast-dllm prefix"]
    where = tmp_path / "rows.json"
    small = ["--sequences", "12", "--one", "6", "--eager", "6", "--batch", "2"]
    bench.main(["--antiberty", *small, "--methods", *names[1:], "--json", str(where)])
    shown, report = capsys.readouterr().out, json.loads(where.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert [*rows] == names
    assert all(f"\n{name}  " in shown for name in names)
    assert all(f"\n{name}: refused; {why}" in shown for name, why in antibody.REFUSED.items())
    masks = 12 + 16 + 8
    for name, row in rows.items():
        few = name != "dual, one block + threshold"
        assert row["tokens"] == 2 * masks * (1 if few else 2)
        assert len(row["recovered"]) == (6 if few else 12)
        assert row["accuracy"] == pytest.approx(sum(row["recovered"]) / len(row["recovered"]))
        assert (row["forwards"] == masks) == few
        assert row["of_eager"] == pytest.approx(row["cheaper"] * row["fewer"])
    assert rows["inductor"]["same_tokens"] == rows["inductor"]["flops"] == 1.0
    assert rows["inductor"]["gain"] == rows["inductor"]["gain_error"] == 0.0
    assert rows["fast-dllm prefix"]["steps"]["block"] > rows["fast-dllm prefix"]["steps"]["full"] > 0
    assert rows["fast-dllm prefix"]["flops"] < 0.9


def test_speeds_are_compared_over_what_both_did() -> None:
    given = small_batches(6, 2)

    def found(name: str, *jobs: tuple[float, float, int]) -> antibody.Found:
        return antibody.Found(
            Row(name, jobs=[dict(zip(("seconds", "cpu", "forwards"), job, strict=True)) for job in jobs]), []
        )

    eager, fast = found("eager", (12.0, 8.0, 12)), found("fast", (2.0, 2.0, 4), (100.0, 1.0, 1), (100.0, 1.0, 1))
    antibody.compared([eager, fast], given)
    row = fast.row
    assert (row.vs_eager, fast.of_eager) == (6.0, 4.0)
    assert row.fewer == 3.0
    assert row.cheaper == pytest.approx(4 / 3)
    assert row.tokens_per_second == pytest.approx(2 * (12 + 16 + 8) / 202.0)


def test_a_small_bert_is_computed_as_it_is_where_nothing_is_old() -> None:
    """Absolute positions, token types and a prompt on both sides of the masks: a refresh at every step is exact."""
    model, given = small_bert(), small_batches(6, 2)
    how = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "shift": False, "lowering": "eager"}
    for options, loop_of in ((how, {"block": 8}), ({**how, "cache": "prefix"}, {"block": 8})):
        eager = Contender("eager", loop=partial(fill, **loop_of))
        found, results = antibody.measure(eager, model, given)
        neutral = Contender("neutral", {**options, "refresh_interval": 1}, loop=partial(fill, **loop_of))
        again, same = antibody.measure(neutral, model, given, results)
        assert again.row.same_tokens == 1.0
        assert again.recovered == found.recovered
        for ids, other in zip(same, results, strict=True):
            assert_close(ids, other)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sequences", "7"], "--sequences 7 is not a multiple of --batch 8"),
        (["--eager", "9"], "--eager 9 is not a multiple of --batch 8"),
        (["--one", "9"], "--one 9 is not a multiple of --batch 8"),
        (["--antib"], "write --antiberty in full"),
        (["--methods", "drafts"], "drafts runs in generate alone"),
        (["--methods", "dual"], "there is no row 'dual'"),
    ],
)
def test_mistakes_are_told(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench.main(words if "--antib" in words else ["--antiberty", *words])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


# -- sequences, from tables that are not ours --------------------------------------------------------------------------


@needs_tables
def test_sequences_are_distinct_germlines_of_one_length_a_batch() -> None:
    given = antibody.batches(200, 8)
    texts = ["".join(RESIDUES[i - SPECIAL] for i in row[1:-1].tolist()) for each in given for row in each.truth]
    assert len(set(texts)) == len(texts) == 200
    sizes = Counter((each.truth.shape[1] - 2, each.job.response) for each in given)
    assert {*sizes} == {(chain.length, stretch) for chain in CHAINS for stretch in STRETCHES}
    genes = antibody.germlines()
    for text in texts:
        chain = next(each for each in CHAINS if each.length == len(text))
        v = {each for each in genes[chain.name][0] if text.startswith(each)}
        j = {each for each in genes[chain.name][1] if text.endswith(each)}
        joined = {len(text) - len(a) - len(b) for a in v for b in j}
        assert any(chain.joined[0] <= each <= chain.joined[1] for each in joined)
    used = Counter(v for v in genes["H"][0] for text in texts if text.startswith(v) and len(text) == CHAINS[0].length)
    assert max(used.values()) == 1  # there are more genes than sequences
    again = antibody.batches(200, 8)
    assert all(torch.equal(a.job.ids, b.job.ids) for a, b in zip(given, again, strict=True))
    assert not torch.equal(antibody.batches(8, 8, seed=1)[0].job.ids, given[0].job.ids)


@needs_tables
def test_more_sequences_than_there_are_is_told() -> None:
    with pytest.raises(ValueError, match="distinct regions of chain"):
        antibody.batches(24000, 8)
