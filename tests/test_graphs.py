"""Graphs as users write them: keywords, gradients, random numbers, dynamic shapes, and what the compiler fails at."""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torchao import quantization

import dllm_compile
from dllm_compile import backend
from dllm_compile.core.errors import GraphRefused, refusing
from dllm_compile.core.sizes import Size
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.lower import lower
from dllm_compile.runtime.unit_code import UnitCode

from . import models

NEUTRAL = {"prompt_interval": 1, "response_interval": 1}
PARTIAL = {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5}
METHODS = (
    NEUTRAL,
    PARTIAL,
    {"cache": "dual", "block_length": 4},
    {"cache": "dual", "keep_ratio": 0.5, "block_length": 4},
    {"method": "dyllm", "full_steps": 2},
)


class Layer(nn.Module):
    """A layer of grouped attention; ``keywords`` says how it calls what it calls."""

    def __init__(self, keywords: bool, width: int = 32, heads: int = 4, groups: int = 2) -> None:
        super().__init__()
        self.keywords, self.heads, self.groups = keywords, heads, groups
        narrow = width * groups // heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, narrow), nn.Linear(width, narrow)
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 48), nn.Linear(48, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.q, self.k, self.v
        if self.keywords:
            n = F.layer_norm(weight=self.norm.weight, bias=self.norm.bias, input=x, normalized_shape=(width,))
            query = F.linear(input=n, weight=q.weight, bias=q.bias).view(size=(batch, tokens, self.heads, -1))
            query = query.transpose(dim0=1, dim1=2)
            key = torch.reshape(input=k(n), shape=(batch, tokens, self.groups, -1)).permute(dims=(0, 2, 1, 3))
            value = torch.unflatten(input=v(n), dim=-1, sizes=(self.groups, -1)).transpose(1, 2)
            seen = F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=mask, enable_gqa=True)
            seen = torch.transpose(input=seen, dim0=1, dim1=2).reshape(shape=(batch, tokens, width))
            x = x + F.linear(weight=self.out.weight, bias=self.out.bias, input=seen)
            up = F.softmax(input=self.up(x), dim=-1)
            return x + self.down(torch.cat(tensors=[up[..., :7], up[..., 7:]], dim=-1))
        n = self.norm(x)
        query = q(n).view(batch, tokens, self.heads, -1).transpose(1, 2)
        key = k(n).reshape(batch, tokens, self.groups, -1).permute(0, 2, 1, 3)
        value = v(n).unflatten(-1, (self.groups, -1)).transpose(1, 2)
        seen = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, enable_gqa=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, tokens, width))
        up = torch.softmax(self.up(x), -1)
        return x + self.down(torch.cat([up[..., :7], up[..., 7:]], -1))


class Model(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, layers: list[nn.Module], keywords: bool = False, width: int = 32) -> None:
        super().__init__()
        self.keywords = keywords
        self.embed, self.layers = nn.Embedding(models.VOCABULARY, width), nn.ModuleList(layers)
        self.head = nn.Linear(width, models.VOCABULARY)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = F.embedding(input=ids, weight=self.embed.weight) if self.keywords else self.embed(ids)
        for layer in self.layers:
            x = layer(x, mask)
        out: torch.Tensor = self.head(x)
        return out


def model(keywords: bool = False) -> Model:
    torch.manual_seed(0)
    return Model([Layer(keywords) for _ in range(3)], keywords).double().eval()


def steps(call: Callable[[torch.Tensor], torch.Tensor], prompt: int = 9, count: int = 6) -> list[torch.Tensor]:
    """Logits of the masked rows, a token a step."""
    ids, out = models.start(prompt, 8), []
    with torch.no_grad():
        for i in range(count):
            logits = call(ids)
            out.append(logits[ids == models.MASK].clone())
            ids = ids.clone()
            ids[:, prompt + i] = logits[:, prompt + i, : models.MASK].argmax(-1)
    return out


@pytest.mark.shares_graphs
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_keywords_make_no_difference(options: dict[str, Any], padded: bool) -> None:
    mask = None
    if padded:
        mask = torch.ones(2, 1, 1, 17, dtype=torch.bool)
        mask[1, ..., :3] = False
    found = []
    for keywords in (False, True):
        dllm_compile.reset()
        call = models.compiled(model(keywords), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(steps(lambda ids, call=call: call(ids, mask)))  # type: ignore[misc]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


class Repeated(Layer):
    """Grouped heads whose keys and values are repeated as ``spell`` says."""

    def __init__(self, spell: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(keywords=False)
        self.spell = spell

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        query, key, value = (to(self.norm(x)).unflatten(-1, (-1, 8)).transpose(1, 2) for to in (self.q, self.k, self.v))
        seen = F.scaled_dot_product_attention(query, self.spell(key), self.spell(value), mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.down(self.up(x).relu())


def repeated(spell: Callable[[torch.Tensor], torch.Tensor]) -> Model:
    torch.manual_seed(0)
    return Model([Repeated(spell) for _ in range(2)]).double().eval()


@pytest.mark.parametrize("options", [NEUTRAL, PARTIAL, {"method": "dyllm", "full_steps": 2}], ids=str)
def test_grouped_heads_may_be_repeated(options: dict[str, Any]) -> None:
    """As ``repeat`` has it the groups come one after another; the smaller tensor before is kept, as with ``expand``."""
    found, kept, ran = [], [], []
    for spell in (lambda t: t.repeat(1, 2, 1, 1)), (lambda t: t[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2)):
        m = repeated(spell)
        dllm_compile.reset()
        found.append(steps(models.compiled_loop(m, **options)))
        said = dllm_compile.stats(m)
        assert not said["refused"]
        kept.append(said["state_bytes"])
        ran.append(said["steps"])
    for got, want, exact in zip(*found, steps(repeated(lambda t: t.repeat(1, 2, 1, 1))), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        if options == NEUTRAL:
            torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)
    assert kept[0] == kept[1]
    assert ran[0] == ran[1]
    assert options == NEUTRAL or {"select", "salient"} & ran[0].keys()


@pytest.mark.filterwarnings("ignore:dllm")
@pytest.mark.parametrize("times", [(1, 2, 2, 1), (2, 2, 1, 1)], ids=["tokens", "batch"])
def test_repeated_tokens_or_sequences_are_computed_whole(times: tuple[int, ...]) -> None:
    m = repeated(lambda t: t.repeat(times)[: t.shape[0]])
    dllm_compile.reset()
    for got, want in zip(steps(models.compiled_loop(m, **PARTIAL)), steps(m), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    said = dllm_compile.stats(m)
    assert said["refused"] or set(said["steps"]) <= {"full", "exact"}


def test_a_call_has_one_form() -> None:
    from dllm_compile.core.arguments import canonical

    x = torch.fx.Graph().placeholder("x")

    def form(target: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        op = "call_method" if isinstance(target, str) else "call_function"
        node = x.graph.create_node(op, target, args, kwargs)
        canonical(node)
        return node.args, node.kwargs

    assert form(F.linear, weight=x, input=x) == ((x, x), {})
    assert form(F.scaled_dot_product_attention, x, x, x, None, 0.0) == ((x, x, x), {})
    assert form(F.scaled_dot_product_attention, x, value=x, key=x, is_causal=True) == ((x, x, x), {"is_causal": True})
    assert form("sum", x, axis=-1, keepdims=True) == ((x, -1), {"keepdim": True})
    assert form(torch.where, condition=x, other=0, input=x) == ((x, x, 0), {})
    assert form("to", x, dtype=torch.float32) in (((x, torch.float32), {}), ((x,), {"dtype": torch.float32}))
    assert form(torch.arange, end=5) == ((5,), {})
    assert form(torch.std, x, dim=1, correction=0) == ((x,), {"dim": 1, "correction": 0})


def test_an_addition_with_a_factor_is_not_read_as_a_mask() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            scores = torch.add(x @ x.transpose(1, 2), mask, alpha=3)
            return x + torch.softmax(scores, -1) @ x

    plain = Model([Scaled()]).double().eval()
    mask = torch.randn(17, 17, dtype=torch.float64)
    call = models.compiled(plain, method="exact")
    for got, want in zip(steps(lambda ids: call(ids, mask)), steps(lambda ids: plain(ids, mask)), strict=True):
        torch.testing.assert_close(got, want)


# -- gradients and plain Inductor -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_training_and_generating_in_turn_equal_eager(lowering: str) -> None:
    plain, trained = (Model([Layer(False)]) for _ in range(2))
    trained.load_state_dict(plain.state_dict())
    call = torch.compile(trained, backend="dllm", options={"lowering": lowering, "mask_id": models.MASK, **NEUTRAL})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(2):
            for m, forward in ((plain, plain), (trained, call)):
                m.zero_grad()
                loss = forward(models.start(9, 8)).pow(2).mean() + m.head.weight.pow(2).sum()
                loss.backward()
            for p, q in zip(plain.parameters(), trained.parameters(), strict=True):
                assert p.grad is not None
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
                with torch.no_grad():
                    p.sub_(0.01 * p.grad)
                    q.copy_(p)
            for got, want in zip(steps(call, count=3), steps(plain, count=3), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert dllm_compile.stats(trained)["steps"] == {"full": 6}


# -- failures of ours -------------------------------------------------------------------------------------------------


def test_an_error_in_the_analysis_runs_plainly_and_names_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(node: torch.fx.Node, axes: Any) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(import_module("dllm_compile.passes.regions"), "_check_attention", broken)
    m = model()
    with pytest.raises((IndexError, torch._dynamo.exc.BackendCompilerFailed), match="tuple index out of range"):
        steps(models.compiled(m))
    torch._dynamo.reset()
    monkeypatch.setenv("DLLM_DEBUG", "0")
    with pytest.warns(UserWarning, match=r"analyzed, by IndexError: tuple index.*please report.*scaled_dot") as said:
        got = steps(models.compiled(m))
    assert len(said) == 1
    for a, b in zip(got, steps(m), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()
    with pytest.raises((IndexError, torch._dynamo.exc.BackendCompilerFailed), match="tuple index out of range"):
        steps(models.compiled(m, verify=1))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_variant_that_cannot_be_compiled_in_mid_sequence(monkeypatch: pytest.MonkeyPatch, interrupted: bool) -> None:
    make = UnitCode._compile

    def broken(self: UnitCode, assignment: Any, step: Any, values: Any) -> Any:
        if assignment.name == "select":
            raise KeyboardInterrupt if interrupted else RuntimeError("no such kernel")
        return make(self, assignment, step, values)

    monkeypatch.setattr(UnitCode, "_compile", broken)
    monkeypatch.setenv("DLLM_DEBUG", "0")
    m = model()
    call = models.compiled(m, **PARTIAL)
    if interrupted:
        with pytest.raises(KeyboardInterrupt):
            steps(call)
        return
    with pytest.warns(UserWarning, match="'select', by RuntimeError: no such kernel; please report") as said:
        got = steps(call)
    assert len(said) == 1
    for a, b in zip(got, steps(m), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert dllm_compile.stats(m)["state_bytes"] == 0


@pytest.mark.parametrize("shared", [1, 2], ids=["key", "value"])
def test_queries_that_are_keys_or_values_run_plainly(shared: int) -> None:
    """They were computed for the rows of the step, and stood for all keys."""

    class Shared(Layer):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            made = [self.q(x), self.out(x), self.q(x) + self.out(x)]
            made[shared] = made[0]
            q, k, v = (each.unflatten(-1, (4, 8)).transpose(1, 2) for each in made)
            return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    m = Model([Shared(False), Shared(False)]).double().eval()
    with pytest.warns(UserWarning, match="queries of attention are its keys"):
        got = steps(models.compiled_loop(m, **PARTIAL), count=3)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(got, steps(m, count=3), strict=True))


def test_flex_attention_that_changes_scores_runs_plainly() -> None:
    class Flex(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            y = x.unflatten(-1, (2, 16)).transpose(1, 2)
            seen = flex_attention(y, y, y, score_mod=lambda score, b, h, q, k: score - 0.1 * (q - k).abs())
            return x + seen.transpose(1, 2).flatten(2)

    m = Model([Flex()]).eval()
    with pytest.warns(UserWarning, match=r"flex_attention changes its scores"):
        got = steps(models.compiled(m, **PARTIAL))
    for a, b in zip(got, steps(m), strict=True):
        torch.testing.assert_close(a, b)
    assert dllm_compile.stats()["refused"]


def test_an_error_within_a_vmap_leaves_no_vmap_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_DEBUG", "0")

    def fail(x: torch.Tensor) -> torch.Tensor:
        torch._C._functorch._vmap_increment_nesting(2, "error")
        raise ValueError("no more")

    with pytest.raises(GraphRefused, match="analyzed, by ValueError: no more"), refusing("analyzed"):
        fail(torch.zeros(2))
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0


def test_quantized_weights_are_compiled_for_any_number_of_rows() -> None:
    linear = nn.Linear(32, 32).eval()
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    graph = torch.fx.Graph()
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    graph.output((graph.call_function(F.linear, (x, weight, bias)),))
    module = torch.fx.GraphModule(nn.Module(), graph)
    with torch.no_grad():
        given = [torch.randn(2, 5, 32), linear.weight, linear.bias]
        code = lower(module, given, "inductor", [(2, Size(("rows",)), 32), None, None])
        for rows in (5, 9):
            given = torch.randn(2, rows, 32)
            torch.testing.assert_close(code.run(given, linear.weight, linear.bias)[0], linear(given))


# -- random numbers ---------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.noise = Layer(False), noise

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.noise(self.inner(x, mask))


NOISE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "dropout": lambda x: F.dropout(x, 0.5),
    "rand": lambda x: x + torch.rand(1, dtype=x.dtype),
    "randn_like": lambda x: x + torch.randn_like(x),
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
    "attention": lambda x: x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0],
}


@pytest.mark.parametrize("name", NOISE)
def test_random_numbers_are_drawn_at_every_call(name: str) -> None:
    call = models.compiled(Model([Noisy(NOISE[name]), Layer(False)]).double().eval(), method="exact")
    ids = models.start(9, 8)
    with torch.no_grad(), pytest.warns(UserWarning, match="at random|random numbers"):
        first, second = call(ids), call(ids)
    assert not torch.equal(first, second)


def test_dropout_that_is_off_is_cached() -> None:
    m = Model([Noisy(lambda x: F.dropout(x, 0.5, training=False)), Layer(False)]).double().eval()
    steps(models.compiled_loop(m, **PARTIAL))
    assert dllm_compile.stats(m)["steps"]["select"] == 4


# -- the trial of a layer ---------------------------------------------------------------------------------------------


@torch.library.custom_op("dllm_test::mixes", mutates_args=())
def mixes(x: torch.Tensor) -> torch.Tensor:
    """Rows that hold a hundredth of the mean of all."""
    return x + 0.01 * x.mean(1, keepdim=True)


@torch.library.custom_op("dllm_test::row_by_row", mutates_args=())
def row_by_row(x: torch.Tensor) -> torch.Tensor:
    """Rows that do not."""
    return x * 1.01


for _op in (mixes, row_by_row):
    _op.register_fake(torch.empty_like)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["mixes", "row by row", "experts"])
def test_a_layer_whose_rows_mix_is_found_in_every_precision(form: str, dtype: torch.dtype) -> None:
    unit_code.forget()
    m: nn.Module
    if form == "experts":
        m = models.build("qwen3-moe", dtype, num_hidden_layers=2)
    else:
        torch.manual_seed(0)
        m = Model([Noisy(mixes if form == "mixes" else row_by_row) for _ in range(2)]).to(dtype).eval()
    call = models.compiled(m, **PARTIAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps((lambda ids: call(input_ids=ids).logits) if form == "experts" else call, count=3)
    tried = [code.narrows for code in unit_code._SHARED.values() if code.mixing and code.unit.is_layer]
    assert tried == [form != "mixes"]


def _set(index: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(x: torch.Tensor) -> torch.Tensor:
        out = x * 1.01
        out[index] = 0.5
        return out

    return changed


BY_PLACE: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "first row read": (lambda x: x - 0.5 * x[:, :1], False),
    "first row filled": (lambda x: x.index_fill(1, torch.zeros(1, dtype=torch.long), 0.5), False),
    "first row set": (_set((slice(None), 0)), False),
    "a row set that few rows do not have": (_set((slice(None), slice(11, 12))), False),
    "one feature set": (_set((..., 0)), True),
}
"""What the MLP of a layer does to its rows, and whether it does the same to each."""


class Changed(nn.Module):
    def __init__(self, linear: nn.Linear, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.change = linear, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.change(self.linear(x))


@pytest.mark.parametrize("how", BY_PLACE)
def test_a_layer_that_treats_a_row_by_its_place_computes_all(how: str) -> None:
    change, alike = BY_PLACE[how]
    m = model()
    for layer in m.layers:
        layer.up = Changed(layer.up, change)  # type: ignore[assignment,arg-type]
    want = steps(m, count=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for got, value in zip(steps(models.compiled_loop(m, **NEUTRAL), count=3), want, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=1e-12)
        steps(models.compiled_loop(m, **PARTIAL), count=3)
    said = dllm_compile.stats(m)
    assert not said["refused"]
    assert bool(said["layers"]["cached"]) == alike


# -- dynamic shapes, and the last graph -------------------------------------------------------------------------------


def test_dynamic_shapes_are_cached() -> None:
    m = models.build("llama", num_hidden_layers=2)
    for options, seen in ((NEUTRAL, {"full": 6}), (PARTIAL, {"full": 2, "select": 4})):
        torch._dynamo.reset()
        dllm_compile.reset()
        given = {"lowering": "eager", "mask_id": models.MASK, **options}
        call = torch.compile(m, backend="dllm", dynamic=True, options=given)
        gc.collect()  # the session before may die, and its steps are no longer counted
        before = dllm_compile.stats(m)["steps"]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="dllm")
            for prompt in (9, 12):
                got = steps(lambda ids: call(input_ids=ids).logits, prompt, 3)  # noqa: B023
                if options is NEUTRAL:
                    for a, b in zip(got, steps(lambda ids: m(input_ids=ids).logits, prompt, 3), strict=True):
                        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
        now = dllm_compile.stats(m)["steps"]
        assert {name: n - before.get(name, 0) for name, n in now.items() if n != before.get(name, 0)} == seen


def test_the_last_graph_that_dynamo_makes_is_announced() -> None:
    given = {"lowering": "eager", "mask_id": models.MASK, **NEUTRAL}
    call = torch.compile(Model([Layer(False)]).eval(), backend="dllm", dynamic=False, options=given)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="dllm")
            call(models.start(9, 8))
        with pytest.warns(UserWarning, match=r"graph 2 of 2 .* ids of 2 x 18; .*recompile_limit"):
            call(models.start(10, 8))


def test_stats_say_when_nothing_of_a_model_was_compiled() -> None:
    m = model()
    m.compile(backend="dllm", options={"lowering": "eager", "mask_id": models.MASK})
    steps(m.forward, count=1)
    assert dllm_compile.stats(m)["compiled"] is False
    steps(m, count=1)
    assert dllm_compile.stats(m)["compiled"] is True


def test_numbers_that_python_takes_for_equal_are_told_apart() -> None:
    """0.0 is not -0.0, and NaN is itself, though ``nan != nan``."""
    m = model()

    def signed(ids: torch.Tensor, sign: float) -> torch.Tensor:
        return torch.copysign(m(ids).abs(), torch.full((), sign, dtype=torch.float64))

    given = {"lowering": "eager", "mask_id": models.MASK, **NEUTRAL}
    call, x = torch.compile(signed, backend="dllm", dynamic=True, options=given), models.start(9, 8)
    with torch.no_grad():
        for sign in (1.0, 0.0, -0.0, 2.0):
            torch.testing.assert_close(call(x, sign), signed(x, sign), rtol=0, atol=1e-9)
        call(x, math.nan)
        with mock.patch.object(backend, "Program", side_effect=AssertionError):
            call(x, math.nan)
