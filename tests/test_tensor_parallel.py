"""A Llama that two processes share, by PyTorch or by transformers: every method computes what it does in one."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from . import ranks
from .ranks import BY_TRANSFORMERS, LOADED, METHODS, RANKS

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
PARTIAL = {
    "fast-dllm dual": {"block"},
    "fast-dllm prefix": {"block"},
    "dllm-cache": {"select", "response"},
    "sparse-dllm": {"sparse"},
    "dyllm": {"salient"},
    "dkv-cache": {"block"},
    "flashblock": {"inside"},
    "sparse and dyllm": {"salient"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found; found once, however many workers of pytest ask."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _find(folder)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(RANKS)]


def _find(folder: Path) -> None:
    """Run the ranks; the folder is there once all of them are done."""
    begun = folder.with_name("ranks_begun")
    begun.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        torch.multiprocessing.spawn(ranks.work, (port, str(begun)), RANKS)  # type: ignore[no-untyped-call]
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
    begun.rename(folder)


def same_at_each_step(whole: dict[str, Any], part: dict[str, Any]) -> bool:
    """Tokens, and logits of what is masked, up to the order of sums."""
    assert torch.equal(whole["tokens"], part["tokens"])
    pairs = [*zip(whole["logits"], part["logits"], strict=True)]
    return all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in pairs)


def chosen(run: dict[str, Any]) -> list[dict[int, list[Any]]]:
    """Rows that layers chose, as sets: of equally good ones the order may differ."""
    return [{layer: rows.sort(-1).values.tolist() for layer, rows in each.items()} for each in run["chosen"]]


def see_that_runs_are_alike(whole: dict[str, Any], part: dict[str, Any]) -> None:
    """Of one process, and of one of two ranks, which is cached: tokens, logits, kinds of steps, rows."""
    assert part["refused"] == []
    assert same_at_each_step(whole, part)
    assert part["kinds"] == whole["kinds"]
    assert part["computed"] == whole["computed"]
    assert chosen(part) == chosen(whole)


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_compute_what_one_process_does(found: list[dict[str, Any]], method: str) -> None:
    for each in found:
        whole, part = each["methods"][method]
        see_that_runs_are_alike(whole, part)
        assert set(part["kinds"]) >= PARTIAL.get(method, {"full"})


@pytest.mark.skipif(not BY_TRANSFORMERS, reason="transformers before 5.24")
@pytest.mark.parametrize("method", LOADED)
def test_a_model_that_transformers_shares_is_cached(found: list[dict[str, Any]], method: str) -> None:
    """``from_pretrained(..., tp_plan="auto")``: embedding, heads, MLP and logits are shared."""
    for each in found:
        whole, part = each["loaded"][method]
        see_that_runs_are_alike(whole, part)
        assert part["state_bytes"] < whole["state_bytes"]
    one, other = (each["loaded"][method][1] for each in found)
    assert all(torch.equal(a, b) for a, b in zip(one["logits"], other["logits"], strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_ranks_have_the_same_bits(found: list[dict[str, Any]], method: str) -> None:
    """What a loop reads, and what was chosen, is equal and not close: else ranks would come to compute other rows."""
    one, other = (each["methods"][method][1] for each in found)
    assert all(torch.equal(a, b) for a, b in zip(one["logits"], other["logits"], strict=True))
    assert [[*map(torch.Tensor.tolist, each.values())] for each in one["chosen"]] == [
        [*map(torch.Tensor.tolist, each.values())] for each in other["chosen"]
    ]


@pytest.mark.parametrize("method", ["fast-dllm dual", "fast-dllm prefix", "dkv-cache"])
def test_each_rank_keeps_its_own_heads(found: list[dict[str, Any]], method: str) -> None:
    for each in found:
        whole, part = each["methods"][method]
        assert part["state_bytes"] == whole["state_bytes"] // RANKS > 0


def test_a_statistic_of_its_own_heads_would_choose_other_rows(found: list[dict[str, Any]]) -> None:
    """So the tests above see that it is summed."""
    for each in found:
        whole, _ = each["methods"]["dllm-cache"]
        assert chosen(each["by each rank alone"]) != chosen(whole)
    assert chosen(found[0]["by each rank alone"]) != chosen(found[1]["by each rank alone"])


def test_inductor_compiles_the_sums(found: list[dict[str, Any]]) -> None:
    """With biases, norms of queries and keys, and an embedding of which each rank has the rows of some tokens."""
    for each in found:
        whole, part = each["compiled"]
        assert part["refused"] == []
        assert same_at_each_step(whole, part)
        assert chosen(part) == chosen(whole)
        assert set(part["kinds"]) >= {"select"}


def test_a_weight_that_one_rank_alone_writes_to_is_noticed_by_all(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["kinds"] == ["full", "block", "block", "full"]
        assert each["error"] < 1e-9


def test_other_token_ids_on_another_rank_are_an_error(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert "given different token ids" in each["said"]


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        ("unequal", "61 features are laid out over 2 ranks in unequal parts"),
        ("columns", "what the graph returns differs between ranks: give output_layouts=Replicate()"),
        ("call", "a call of sharded values that the compiler does not know (at node 'silu'"),
        ("view", "what ranks sum in place is read before, perhaps by a view"),
        ("wholes", "ranks exchange values here, and what each of them holds cannot be told"),
    ],
)
def test_what_cannot_be_followed_runs_on_plain_inductor(found: list[dict[str, Any]], layout: str, reason: str) -> None:
    for each in found:
        error, said = each["refused"][layout]
        assert error < 1e-9
        assert [text for text in said if reason in text] == said
        assert len(said) == 1
