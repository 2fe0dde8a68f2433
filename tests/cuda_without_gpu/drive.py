"""The package's own run-time code, from the backend down, on the pretended device, and what it hands to Inductor.

Dynamo traces the model on the host. Behind it, each tensor is one that says ``cuda:0``: graphs are analyzed, written
for fewer rows and lowered for CUDA as they would be there. What runs is the module that was lowered, in eager.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

import dllm_compile
from dllm_compile.backend import Backend
from dllm_compile.core.sizes import Size, form
from dllm_compile.options import Options
from dllm_compile.runtime import lower as lower_module
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.lower import Code, lower
from dllm_compile.runtime.stats import Stats
from dllm_compile.runtime.step import Step
from dllm_compile.sampler import stepper
from tests.test_properties import Layer, Model, Shape, turned

from . import attention, inductor
from .counts import Counts, counted
from .device import DEVICE, OnDevice, Pretended, held, on_device

MASK = 60
PROMPT, RESPONSE = 17, 24
METHODS: dict[str, dict[str, Any]] = {
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": 8},
    "prefix": {"method": "fast-dllm", "cache": "prefix", "block_length": 8},
    "intervals": {"prompt_interval": 8, "response_interval": 4},
    "flashblock": {"method": "flashblock", "block_length": 8},
    "eviction": {"method": "sparse-dllm", "block_length": 8},
    "eviction of the prompt": {"method": "dllm-cache", "keep_ratio": 0.5},
    "saliency": {"method": "dyllm", "saliency_threshold": 0.9, "shift": False, "full_steps": 2},
    "eviction and saliency": {"method": "sparse-dllm", "saliency_threshold": 0.9, "full_steps": 1, "block_length": 8},
    "skipping": {"method": "es-dllm", "block_length": 8, "row_shares": (0.5,), "row_depths": (0.5,)},
    "decoded": {"method": "dkv-cache", "shift": False},
    "greedy": {"method": "dkv-cache", "cache": "greedy", "delay": 0, "refresh_interval": 2, "window_size": 4},
}
"""Every method, with settings whose first 14 calls run each kind of step of it."""


class _Layer(Layer):
    """Its attention reads a shared key head where it is, as that of transformers does."""

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        a = self.norm_a(x)
        q, k = turned(self.heads(self.q(a)), cos, sin), turned(self.heads(self.k(a)), cos, sin)
        more = {"enable_gqa": True} if self.shape.groups > 1 else {}
        out = torch.nn.functional.scaled_dot_product_attention(q, k, self.heads(self.v(a)), attn_mask=mask, **more)
        x = x + self.o(out.transpose(1, 2).reshape(x.shape))
        m = self.norm_m(x)
        y: torch.Tensor = x + self.down(torch.nn.functional.silu(self.gate(m)) * self.up(m))
        return y


@cache
def model(dtype: torch.dtype = torch.bfloat16, shared: bool = False) -> Model:
    """Two layers of four query heads of 16; with ``shared``, on two key heads."""
    made = Model(Shape(layers=2, heads=4, groups=1 + shared, head_dim=16, seed=0))
    for layer in made.layers:
        layer.__class__ = _Layer
    return made.to(dtype).eval()  # type: ignore[no-any-return]


@dataclass
class Lowered:
    """A graph that was lowered for CUDA.

    Attributes:
        part: ``"layer"``, ``"head"`` or ``"stem"``.
        step: the assignment's name.
        attention: what was chosen for each call of the model's own attention.
        counts: of what was generated.
        kernels: Triton kernels, in order.
        code: Python that Inductor generated.
        key: of the graph, equal for those that are lowered to the same.
    """

    part: str
    step: str
    attention: tuple[str, ...]
    counts: Counts
    kernels: list[inductor.Kernel]
    code: str
    key: str


_LOWERED: dict[str, tuple[Code, Lowered]] = {}


def on_cuda(module: torch.fx.GraphModule, chosen: attention.Chosen | None = None) -> torch.fx.GraphModule:
    """A copy of a graph that names the GPU where it named the CPU; with ``chosen``, attention is what CUDA takes."""
    module = copy.deepcopy(module)

    def away(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cpu":
            return DEVICE
        return "cuda" if isinstance(value, str) and value == "cpu" else value

    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.args = torch.fx.node.map_aggregate(node.args, away)
                node.kwargs = torch.fx.node.map_aggregate(dict(node.kwargs), away)
                shown = node.meta.get("example_value")
                if isinstance(shown, FakeTensor) and shown.device.type == "cpu":
                    with shown.fake_mode:
                        size = {"size": shown.shape, "stride": shown.stride(), "dtype": shown.dtype}
                        node.meta["example_value"] = torch.empty_strided(**size, device=DEVICE)
                if chosen is not None and node.target is torch.nn.functional.scaled_dot_product_attention:
                    node.target = chosen
            part.recompile()
    return module


@dataclass
class StepSeen:
    """What one call did.

    Attributes:
        name: of the step that it was.
        crossings: reads and copies; see :class:`tests.cuda_without_gpu.device.Crossing`.
        copied: copies that the device made.
        logits: readable ones, on the host.
        active: active rows a sequence.
    """

    name: str
    crossings: list[Any]
    copied: list[Any]
    logits: torch.Tensor
    active: int | None = None

    def lines(self, kind: str) -> list[str]:
        """Where its reads, or copies, are asked for."""
        return [each.line for each in self.crossings if each.kind == kind]


@dataclass
class Driven:
    """A loop that ran.

    Attributes:
        steps: its calls.
        lowered: graphs, where they were lowered.
        refused: why graphs ran as plain Inductor.
    """

    steps: list[StepSeen] = field(default_factory=list)
    lowered: list[Lowered] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def compiled(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """``function`` behind the backend, called with tensors on the pretended device.

    Dynamo traces it once for all options, as its graphs do not depend on them.
    """
    if function not in _TRACED:
        _TRACED[function] = _traced(function)
    made: dict[int, Backend] = {}
    traced = _TRACED[function]

    def call(*args: Any, **more: Any) -> Any:
        return traced(made, options, args, more)

    return call


_TRACED: dict[Any, Callable[..., Any]] = {}


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    weights: dict[int, tuple[torch.Tensor, OnDevice]] = {}
    given: dict[int, OnDevice] = {}
    chosen: list[Any] = []

    def there(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in given:
            return given[id(value)]
        return weights.setdefault(id(value), (value, on_device(value)))[1]

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graph = on_cuda(module)

        def run(*args: Any) -> Any:
            mode, made, options = chosen
            if id(graph) not in made:
                made[id(graph)] = Backend(module if mode is None else graph, Options.of({"mask_id": MASK, **options}))
            if mode is None:
                return made[id(graph)](*args)
            with mode.entered(), torch.no_grad():
                return made[id(graph)](*map(there, args))

        return run

    traced = torch.compile(function, backend=backend)

    def call(made: dict[int, Backend], options: dict[str, Any], args: Any, more: Any) -> Any:
        mode = Pretended.active
        chosen[:] = mode, made, options
        if mode is None:
            return traced(*args, **more)
        given.clear()
        given.update({id(each.held): each for each in tree_leaves((args, more)) if isinstance(each, OnDevice)})
        with mode.left():
            return traced(*held(args), **held(more))

    return call


Watch = Callable[[Lowered, torch.fx.GraphModule], Callable[..., Any]]


def _recorder(driven: Driven, mode: Pretended, capability: int, watch: Watch | None) -> Callable[..., Code]:
    """In place of :func:`dllm_compile.runtime.lower.lower`: lowers for CUDA, and returns code that runs in eager."""

    def lowered(
        module: torch.fx.GraphModule, args: Any, how: str, extents: Any = (), writes: bool = False, fixed: Any = ()
    ) -> Code:
        key = _key(module, args, extents, writes, fixed, capability)
        if key not in _LOWERED:
            chosen = attention.Chosen()
            with mode.left(), named_on_the_host(), inductor.pretend(capability) as seen:
                code = lower(on_cuda(module, chosen), args, "inductor", extents, writes, fixed)
            (text,) = seen.codes
            part, step = _PLACE[-1]
            _LOWERED[key] = code, Lowered(part, step, tuple(chosen.names), counted(text), seen.kernels, text, key)
        code, found = _LOWERED[key]
        driven.lowered.append(found)
        mine = copy.copy(code)
        mine.run, mine.served = watch(found, module) if watch else module, {}
        return mine

    return lowered


@contextmanager
def lowered_for_cuda(
    driven: Driven, mode: Pretended, capability: int = 90, watch: Watch | None = None
) -> Iterator[None]:
    """What is compiled inside is lowered for CUDA and noted, and runs in eager; see :func:`run`."""
    put = mock.patch.object
    with (
        put(unit_code, "lower", _recorder(driven, mode, capability, watch)),
        put(unit_code.UnitCode, "_compile", _compile(unit_code.UnitCode._compile)),
    ):
        yield


_PLACE: list[tuple[str, str]] = []


def named_on_the_host() -> Any:
    """PyTorch's cache of graphs is told of tensors by an empty one, which is made on the host here."""
    real = lower_module._made_cacheable
    return mock.patch.object(lower_module, "_made_cacheable", lambda module, _: real(module, torch.device("cpu")))


def _key(module: torch.fx.GraphModule, args: Any, extents: Any, *more: Any) -> str:
    """Equal for graphs that are lowered to the same code, which serves any sizes."""
    sizes = [[*given] if given is not None else [] for given in extents or [None] * len(args)]
    shown: list[Any] = []
    for value, given in zip(args, sizes, strict=True):
        found = [*value.shape] if isinstance(value, torch.Tensor) else [value]
        both = zip(found, given or found, strict=True)
        named = [n if n < 2 or not isinstance(extent, Size) else extent for n, extent in both]
        shown.append((named, (value.dtype, form(value)) if isinstance(value, torch.Tensor) else None))
    nodes = [(str(node.target), str(node.args), str(node.kwargs)) for node in module.graph.nodes]
    return hashlib.sha256(repr((nodes, shown, more)).encode()).hexdigest()


def _compile(real: Callable[..., Any]) -> Callable[..., Any]:
    """Notes which unit is compiled for which assignment."""

    def compile_(self: unit_code.UnitCode, assignment: Any, step: Any, values: Any) -> Any:
        part = "layer" if self.unit.is_layer else "stem" if self.unit.stream is None else "head"
        _PLACE.append((part, assignment.name))
        try:
            return real(self, assignment, step, values)
        finally:
            _PLACE.pop()

    return compile_


def run(
    name: str,
    batch: int = 1,
    steps: int = 14,
    lowering: bool = False,
    capability: int = 90,
    padded: bool = False,
    shared: bool = False,
    host: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    watch: Watch | None = None,
    **options: Any,
) -> Driven:
    """A loop that fills the surest token of each sequence, block by block.

    Args:
        name: of ``METHODS``.
        batch: sequences.
        steps: calls.
        lowering: lower for CUDA what is compiled.
        capability: of the GPU that it is lowered for.
        padded: hide the first tokens of each sequence but the first.
        shared: two query heads share a key head.
        host: do it on the host instead, to compare with.
        dtype: of the model.
        watch: makes what is called in place of a graph that was lowered.
        options: further ones of the backend.
    """
    dllm_compile.reset()
    ids = torch.randint(3, MASK, (batch, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(1))
    ids[:, PROMPT:] = MASK
    shown = torch.ones_like(ids)
    for row in range(1, batch):
        shown[row, : 2 * row + 1] = 0
    driven, mode, ran = Driven(), Pretended(), list[Step]()
    how = {**METHODS[name], **options, **({} if lowering else {"lowering": "eager"})}
    with ExitStack() as stack:
        stack.enter_context(_noted(ran))
        if not host:
            stack.enter_context(mode)
        if lowering:
            stack.enter_context(lowered_for_cuda(driven, mode, capability, watch))
        call = compiled(model(dtype, shared), how)
        there = (lambda value: value) if host else on_device
        more = {"mask": there(shown)} if padded else {}
        stack.enter_context(torch.no_grad())
        for _ in range(steps):
            x = there(ids)
            mode.crossings.clear()
            mode.copied.clear()
            logits = held(call(x, **more)).double()
            readable = logits[ids == MASK].clone()
            driven.steps.append(
                StepSeen(
                    ran[-1].counted or ran[-1].assignment.name,
                    [*mode.crossings],
                    [*mode.copied],
                    readable,
                    ran[-1].sizes.get("active"),
                )
            )
            ids = _filled(ids, logits)
        driven.refused = dllm_compile.stats()["refused"]
    return driven


def generate(dtype: torch.dtype = torch.bfloat16, watch: Watch | None = None) -> Driven:
    """``dllm_compile.generate`` lowered for CUDA: two blocks, each call of which writes the surest tokens.

    Args:
        dtype: of the model.
        watch: as for :func:`run`.
    """
    ids = torch.randint(3, MASK, (1, 9), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "threshold": 0.9}
    driven = Driven()
    with (
        mock.patch.object(stepper, "compiled", lambda step, model, options: compiled(step, options)),
        Pretended() as mode,
        lowered_for_cuda(driven, mode, watch=watch),
    ):
        dllm_compile.generate(model(dtype), on_device(ids), gen_length=16, mask_id=MASK, **how)
    return driven


def _noted(steps: list[Step]) -> Any:
    """Notes each step."""
    real = Stats.ran

    def ran(self: Stats, step: Any, *more: Any) -> None:
        real(self, step, *more)
        steps.append(step)

    return mock.patch.object(Stats, "ran", ran)


def _filled(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The ids with the surest token of each sequence's first block of 8 with masks."""
    sure, best = logits.softmax(-1).max(-1)
    new = ids.clone()
    for row, tokens in enumerate(ids):
        first = int((tokens == MASK).int().argmax())
        end = PROMPT + ((first - PROMPT) // 8 + 1) * 8
        among = torch.where(tokens == MASK, sure[row], -1.0)
        among[end:] = -1
        at = int(among.argmax())
        new[row, at] = best[row, at] if best[row, at] != MASK else 5
    return new
