"""Code is made once, for prompts and responses of any length and for any batch of two or more."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

import dllm_compile
from dllm_compile.core.sizes import Size
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.lower import lower

from . import models, small_model
from .grids import in_turn
from .models import MASK
from .rounding import roundings

FIRST = (9, 8, 2), (11, 8, 2), (11, 8, 3)
"""Prompt, response and batch of the loops that make code: Dynamo traces a second time when a size changes."""
THEN = (14, 12, 3), (7, 16, 2), (21, 8, 5), (4, 5, 2)
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "dllm-cache": {"prompt_interval": 4, "response_interval": 2, "transfer_ratio": 0.5},
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": 4},
    "prefix": {"method": "fast-dllm", "cache": "prefix", "block_length": 4},
    "sparse": {"method": "sparse-dllm", "block_length": 4},
    "flashblock": {"method": "flashblock", "block_length": 4},
    "dyllm": {"method": "dyllm", "full_steps": 2},
    "dkv-cache": {"method": "dkv-cache", "refresh_interval": 2},
}


def logits(model: torch.nn.Module, size: tuple[int, int, int], calls: int, **options: Any) -> list[torch.Tensor]:
    """Logits of the masked rows at each call of a loop that fills one token a call, from the left."""
    prompt, response, batch = size
    call, x, out = models.compiled_loop(model, **options), models.start(prompt, response, batch), []
    with torch.no_grad():
        for step in range(calls):
            out.append(call(x).logits[x == MASK].clone())
            x[:, prompt + step] = 3
    return out


@pytest.mark.parametrize(
    ("name", "method"), in_turn(["llama", "qwen2", "modernbert", "esm", "roberta", "olmoe"], ["dual", "dllm-cache"])
)
def test_another_length_makes_no_code(name: str, method: str) -> None:
    makes_no_code(name, method)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dual", "dllm-cache")])
def test_another_length_makes_no_code_under_any_method(method: str) -> None:
    makes_no_code("small", method)


def build(name: str) -> torch.nn.Module:
    """A model of two layers."""
    return small_model.build() if name == "small" else models.build(name, num_hidden_layers=2)


@contextmanager
def passes_run() -> Iterator[list[str]]:
    """The passes that the compiler says it runs."""
    lines: list[str] = []
    handler, logger = logging.Handler(), logging.getLogger("dllm_compile")
    handler.emit = lambda record: lines.append(record.getMessage().split(":")[0])  # type: ignore[method-assign]
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def makes_no_code(name: str, method: str, then: Sequence[tuple[int, int, int]] = THEN) -> None:
    """Nor is the graph of another length analyzed."""
    model, made = build(name), mock.Mock(side_effect=unit_code.lower)
    with mock.patch.object(unit_code, "lower", made), passes_run() as passes:
        for size in FIRST:
            logits(model, size, 5, **METHODS[method])
        assert made.called
        assert "regions" in passes
        made.reset_mock()
        passes.clear()
        for size in then:
            logits(model, size, 5, **METHODS[method])
        assert (made.call_count, passes) == (0, [])
    assert not dllm_compile.stats(model)["refused"]


def test_nor_does_a_length_that_equals_a_size_of_the_model() -> None:
    """Widths, heads, entries of the vocabulary, and products of them."""
    sizes = {n for p in small_model.build().parameters() for n in p.shape if 8 < n < 200}
    makes_no_code("small", "dual", [(n - 8, 8, batch) for n in sorted(sizes) for batch in (2, 4)])


@pytest.mark.parametrize("method", ["dual", "dllm-cache"])
def test_inductor_makes_code_for_any_length(method: str) -> None:
    """As the same graphs do without it, also at other lengths; below, a model of transformers."""
    model = build("small")
    options, sizes = METHODS[method], [*FIRST, *THEN]
    want = [logits(model, size, 5, **options) for size in sizes]
    torch._dynamo.reset()
    for size, wanted in zip(sizes, want, strict=True):
        got = logits(model, size, 5, **options, lowering="inductor")
        assert all(roundings(a, b, torch.float32) <= 32 for a, b in zip(got, wanted, strict=True)), size


# -- what else a size or a stride may be ------------------------------------------------------------------------------


def test_a_decision_that_reads_kept_logits_serves_any_length() -> None:
    """The logits of all rows lie in memory that has one row more."""
    model = models.build("llama", num_hidden_layers=2)

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = model(x).logits
        return torch.where(x == MASK, found.argmax(-1), x), found

    options = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "refresh_interval": 1, "mask_id": MASK}
    call = models.in_a_loop(torch.compile(step, backend="dllm", dynamic=True, options=options))
    with torch.no_grad():
        for prompt, response, batch in ((9, 8, 2), (11, 8, 2), (14, 16, 2), (9, 8, 3)):
            x = models.start(prompt, response, batch)
            for filled in range(3):
                tokens, found = call(x)
                wanted_tokens, wanted = step(x)
                assert torch.equal(tokens, wanted_tokens)
                assert roundings(found[x == MASK], wanted[x == MASK], torch.float32) <= 32
                x[:, prompt + filled] = 3


def test_ids_may_be_a_part_of_a_larger_tensor() -> None:
    model = small_model.build(torch.float32)
    call = models.compiled_loop(model, **METHODS["dual"], lowering="inductor", dynamic=True)
    with torch.no_grad():
        for prompt, response, spare in ((9, 8, 0), (11, 8, 3), (11, 8, 0), (12, 8, 5), (13, 8, 6)):
            room = torch.zeros(2, prompt + response + spare, dtype=torch.int64)
            room[:, : prompt + response] = models.start(prompt, response, 2)
            x = room[:, : prompt + response]
            got, want = call(x).logits, model(x).logits
            assert roundings(got[x == MASK], want[x == MASK], torch.float32) <= 32


class Spelled(torch.nn.Module):
    """A model that writes a size in one of several ways."""

    table: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embed, self.head = how, torch.nn.Embedding(models.VOCABULARY, 32), torch.nn.Linear(32, 61)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))
        self.register_buffer("table", torch.randn(64, 32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        batch, tokens = ids.shape
        if self.how == "narrow":
            x = x.narrow(1, 0, tokens)
        for layer in self.layers:
            query, key, value = (part.view(batch, tokens, 4, 8).transpose(1, 2) for part in layer(x).chunk(3, -1))
            if self.how in ("scores", "filled"):
                scores = query @ key.transpose(-1, -2) * (tokens // 8 if self.how == "scores" else 0.3)
                if self.how == "filled":
                    scores = scores.masked_fill(torch.eye(tokens, dtype=torch.bool), -2.0)
                y = (scores.softmax(-1) @ value).transpose(1, 2)
            else:
                y = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
            if self.how == "dtype":
                y = y.reshape(batch, tokens, 32).view(torch.int32).view(torch.float32)
            elif self.how == "negative":
                y = y.reshape(batch * tokens, 32).unflatten(-2, (batch, tokens))
            elif self.how == "keyword":
                y = torch.reshape(y, shape=(batch, tokens, 32))
            elif self.how == "scale":
                y = y.reshape(batch, tokens, 32) / tokens
            elif self.how == "half":
                y = y.reshape(batch, tokens, 1, 32).expand(batch, tokens, tokens // 2, 32).sum(2)
            elif self.how == "wider":
                seen = y.reshape(batch, tokens, 32) @ self.table[: tokens + 5].t()
                y = seen.view(batch, tokens, 1, -1).mean(-1)
            else:
                y = y.reshape(batch, tokens, 32)
            x = x + y
        logits: torch.Tensor = self.head(x)
        return logits


def test_a_part_of_everything_is_everything() -> None:
    """Also where a step computes fewer rows: as the same model computes them without the call."""
    calls = [models.compiled_loop(Spelled(how).eval(), **METHODS["dual"]) for how in ("narrow", "plain")]
    with torch.no_grad():
        for prompt, response, batch in ((9, 8, 2), (11, 8, 2), (11, 8, 3)):
            x = models.start(prompt, response, batch)
            for step in range(3):
                got, want = (call(x)[x == MASK] for call in calls)
                assert torch.equal(got, want)
                x[:, prompt + step] = 3


@pytest.mark.parametrize("how", ["dtype", "negative", "keyword", "scale", "half", "wider", "scores", "filled"])
def test_a_size_however_it_is_written(how: str) -> None:
    model = Spelled(how).eval()
    call = models.compiled_loop(model, method="exact")
    with torch.no_grad():
        for prompt, response, batch in ((9, 8, 2), (11, 8, 2), (11, 8, 3), (8, 24, 32), (14, 12, 1), (20, 8, 1)):
            x = models.start(prompt, response, batch)
            assert roundings(call(x), model(x)) <= 8
    assert not dllm_compile.stats(model)["refused"]


class Placed(torch.nn.Module):
    """A model that makes a bias of attention, ``[S, S]`` or ``[H, S, S]``, of its sizes in one of several ways."""

    table: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embed, self.head = how, torch.nn.Embedding(models.VOCABULARY, 32), torch.nn.Linear(32, 61)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(32, 96) for _ in range(2))
        self.register_buffer("table", torch.randn(64, 64))

    def bias(self, ids: torch.Tensor, more: Any) -> torch.Tensor:
        batch, tokens = ids.shape
        at = torch.arange(tokens)
        if self.how == "distance":
            return -0.1 * (at[:, None] - at).abs().float()
        if self.how == "backwards":
            return (torch.arange(tokens - 1, -1, -1).float() * 0.1 + torch.linspace(-1, 1, 2 * tokens)[::2])[None]
        if self.how == "table":
            return self.table[:tokens, 1 : tokens + 1]
        if self.how == "written":
            out = torch.zeros(tokens, tokens)
            out += self.table[:tokens, :tokens]
            return out.masked_fill((at[:, None] - at).abs() > 5, -1.0)
        if self.how == "written twice":
            out = torch.zeros(tokens, tokens)
            out.masked_fill_((at[:, None] - at).abs() > 5, -1.0)
            return (out * 0.5)[None]
        if self.how == "floor":
            return torch.full((tokens, tokens), 0.1) * (tokens // 20) * at
        if self.how == "least":
            return torch.full((tokens, tokens), 0.1) * max(tokens, 32) * min(batch, 4) * at
        if self.how == "batch":
            return torch.full((tokens, tokens), 0.1) * at / batch
        if self.how == "number":
            return torch.where((at[:, None] - at).abs() < more, 0.0, -2.0)
        assert self.how == "input"
        reach = torch.arange(more.shape[0]).float()
        return (at[:, None] * 0.01 + (reach * more).sum()).sin().expand(tokens, tokens)

    def forward(self, ids: torch.Tensor, more: Any = None) -> torch.Tensor:
        x, bias = self.embed(ids), self.bias(ids, more)
        for layer in self.layers:
            q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in layer(x).chunk(3, -1))
            x = x + torch.nn.functional.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)
        logits: torch.Tensor = self.head(x)
        return logits


MORE: dict[str, Any] = {
    "number": [19, 19, 8, 19, 19, 26, 23, 4, 20, 29, 33, 16, 2],
    "input": [torch.linspace(-1, 1, n) for n in (19, 19, 8, 19, 19, 26, 23, 4, 20, 29, 33, 16, 2)],
}
"""Beside the ids of each call: some are as large as the number of tokens, by chance."""


@pytest.mark.parametrize(
    "how",
    [
        *("distance", "backwards", "table", "written", "written twice", "floor", "least", "batch", "number", "input"),
    ],
)
def test_what_is_made_of_sizes_is_made_of_those_of_the_call(how: str) -> None:
    model = Placed(how).eval()
    call = torch.compile(model, backend="dllm", options={"mask_id": MASK, "method": "exact", "lowering": "eager"})
    sizes = [
        (11, 8, 2),
        (10, 8, 2),
        (11, 8, 2),
        (11, 8, 3),
        (14, 12, 3),
        (14, 12, 4),
        (7, 16, 2),
        (21, 8, 5),
        (4, 5, 2),
    ]
    sizes += [(20, 9, 1), (21, 9, 1), (25, 8, 1), (8, 8, 8)]
    sizes += [(34, 8, 2), (12, 8, 6), (12, 8, 3)] if how not in MORE else []
    with torch.no_grad():
        for i, (prompt, response, batch) in enumerate(sizes):
            more = [MORE[how][i]] if how in MORE else []
            x = models.start(prompt, response, batch, seed=i)  # fewer of the same sequences go on with their rows
            assert roundings(call(x, *more), model(x, *more)) <= 8, sizes[i]
    assert not dllm_compile.stats(model)["refused"]


def test_sequences_and_tokens_may_be_one_dimension() -> None:
    model = models.build("llama", num_hidden_layers=2)

    def best(x: torch.Tensor) -> torch.Tensor:
        flat = torch.softmax(model(x).logits.view(-1, models.VOCABULARY), -1)
        return flat.max(-1).values.topk(3).values

    options = {"mask_id": MASK, "method": "exact"}
    call = models.in_a_loop(torch.compile(best, backend="dllm", dynamic=True, options=options))
    with torch.no_grad():
        for prompt, response, batch in ((9, 8, 2), (11, 8, 2), (7, 8, 3)):
            x = models.start(prompt, response, batch)
            assert roundings(call(x), best(x), torch.float32) <= 32
    assert not dllm_compile.stats(model)["refused"]


def test_code_says_which_arguments_it_is_good_for() -> None:
    graph = torch.fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output((graph.call_function(torch.add, (x, y)),))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    sizes = (Size(("batch",)), Size(("rows",)), 4)

    def of(batch: int, rows: int, spare: int = 0) -> torch.Tensor:
        return torch.randn(batch, rows + spare, 4)[:, :rows]

    code = lower(module, [of(2, 3), of(2, 3)], "inductor", [sizes, sizes])
    assert code.serves([of(5, 7), of(5, 7)])
    assert not code.serves([of(5, 7, 1), of(5, 7)])
    assert not code.serves([of(5, 1), of(5, 1)])
    spare = lower(module, [of(2, 3, 1), of(2, 3)], "inductor", [sizes, sizes])
    assert spare.serves([of(5, 7, 1), of(5, 7)])
    assert not spare.serves([of(5, 7, 2), of(5, 7)])
    given = [of(5, 7, 1), of(5, 7)]
    assert torch.equal(spare.run(*given)[0], given[0] + given[1])
    fixed = lower(module, [of(2, 3), of(2, 3)], "inductor", [sizes, sizes], fixed={"rows"})
    assert fixed.serves([of(5, 3), of(5, 3)])
    assert not fixed.serves([of(5, 7), of(5, 7)])
