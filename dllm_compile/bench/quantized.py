"""``bench --quantized``: weights of fewer bits, by every tool that is installed, beside float32."""

from __future__ import annotations

import importlib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

import dllm_compile
from dllm_compile.backend import dllm

from .host import Loop, milliseconds
from .model import Setting, random_model

MODEL = Setting(layers=4, width=256, mlp=768, heads=4, vocabulary=2048, prompt=96, response=32)
STEPS = 9  # timed of each
NEUTRAL = {"prompt_interval": 1, "response_interval": 1}

Linears = dict[str, torch.nn.Linear]


@dataclass(frozen=True)
class Tool:
    """A way to quantize linear layers.

    Attributes:
        package: the module that it needs.
        quantize: changes those of a model, given by name, in place.
    """

    package: str
    quantize: Callable[[torch.nn.Module, Linears], None]


def linears(model: Any) -> Linears:
    """The linear layers of a model but its head, by name."""
    head = model.get_output_embeddings()
    found = model.named_modules()
    return {name: each for name, each in found if isinstance(each, torch.nn.Linear) and each is not head}


def _torchao(config: str, home: str = "torchao.quantization", **settings: Any) -> Tool:
    def quantize(model: torch.nn.Module, chosen: Linears) -> None:
        how = getattr(importlib.import_module(home), config)(**settings)
        quantize_ = importlib.import_module("torchao.quantization").quantize_
        quantize_(model, how, filter_fn=lambda _, name: name in chosen)

    return Tool(home, quantize)


def _quanto(model: torch.nn.Module, chosen: Linears) -> None:
    quanto: Any = importlib.import_module("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=[*chosen])
    quanto.freeze(model)


def _bitsandbytes_int8(model: torch.nn.Module, chosen: Linears) -> None:
    nn: Any = importlib.import_module("bitsandbytes.nn")
    for name, linear in chosen.items():
        made = nn.Linear8bitLt(linear.in_features, linear.out_features, linear.bias is not None, has_fp16_weights=False)
        given = nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        made.weight, made.bias = given.to(linear.weight.device), linear.bias  # moving it is what quantizes it
        model.set_submodule(name, made.eval())


def _bitsandbytes_nf4(model: torch.nn.Module, chosen: Linears) -> None:
    nn: Any = importlib.import_module("bitsandbytes.nn")
    for name, linear in chosen.items():
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        made = nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=linear.weight.dtype)
        made.load_state_dict(linear.state_dict())
        model.set_submodule(name, made.to(linear.weight.device).eval())


def _hqq(model: torch.nn.Module, chosen: Linears) -> None:
    hqq: Any = importlib.import_module("hqq.core.quantize")
    config = hqq.BaseQuantizeConfig(nbits=4, group_size=64)
    for name, linear in chosen.items():
        where = {"compute_dtype": linear.weight.dtype, "device": str(linear.weight.device)}
        model.set_submodule(name, hqq.HQQLinear(linear, config, del_orig=False, **where))


TOOLS = {
    "torchao int8": _torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": _torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao int4": _torchao(
        "PrototypeInt4WeightOnlyConfig", "torchao.prototype.quantization.int4", group_size=32, set_inductor_config=False
    ),
    "quanto int8": Tool("optimum.quanto", _quanto),
    "bitsandbytes int8": Tool("bitsandbytes", _bitsandbytes_int8),
    "bitsandbytes nf4": Tool("bitsandbytes", _bitsandbytes_nf4),
    "hqq 4 bits": Tool("hqq", _hqq),
}
"""By name. torchao's int4 is the format of a CPU."""


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # nor the package that it is in
        return False


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the model as it is saved."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


class _Contest:
    """A model and its partial steps, timed."""

    def __init__(self, tool: Tool | None) -> None:
        self.model = random_model(MODEL).requires_grad_(False)
        if tool is not None:
            tool.quantize(self.model, linears(self.model))
        self.plain: Any = torch.compile(self.model)
        self.dual = Loop(self.model, MODEL)
        self.spent: dict[str, list[float]] = {"eager": [], "inductor": [], "dual": []}

    def errors(self) -> tuple[float, float]:
        """Largest difference of a logit from eager, of plain Inductor and of the neutral setting."""
        neutral: Any = torch.compile(self.model, backend=dllm, options={**NEUTRAL, "mask_id": MODEL.vocabulary - 1})
        ids = self.dual.job.ids
        want = self.model(ids).logits
        plain, ours = [(call(ids).logits - want).abs().max().item() for call in (self.plain, neutral)]
        return plain, ours

    def warm(self) -> None:
        """A whole response, so that all of it is compiled."""
        for _ in range(MODEL.response + 8):
            self.dual.next()
            self.dual.step()

    def time(self) -> None:
        """One partial step of each."""
        while not self.dual.next():
            self.dual.step()
        self.spent["dual"].append(milliseconds(self.dual.step))
        self.spent["eager"].append(milliseconds(lambda: self.model(self.dual.x)))
        self.spent["inductor"].append(milliseconds(lambda: self.plain(self.dual.x)))


def _row(tool: Tool) -> str:
    """Bytes, errors, and times interleaved with those of the float32 model."""
    torch.compiler.reset()
    dllm_compile.reset()
    with torch.no_grad():
        one, single = _Contest(tool), _Contest(None)
        plain, neutral = one.errors()
        for each in (one, single):
            each.warm()
        for _ in range(STEPS):
            one.time()
            single.time()
    layers = dllm_compile.stats(one.model)["layers"]
    cells = [f"{weight_bytes(each.model) / 1e6:.1f}" for each in (one, single)]
    for name, times in one.spent.items():
        cells += [f"{median(times):.1f}", f"{median(single.spent[name]):.1f}"]
    cells += [f"{plain:.0e}", f"{neutral:.0e}", f"{layers['cached'] / layers['seen']:.0%}"]
    return "".join(f"{cell:>9}" for cell in cells)


def main() -> None:
    """Print a row for each tool that is installed; the second number of each pair is that of float32."""
    print(f"{MODEL.layers} layers of width {MODEL.width}, {MODEL.prompt} + {MODEL.response} tokens, batch 1, ", end="")
    print(f"median of {STEPS} steps, interleaved with float32 (the second of each pair)")
    names = ("MB", "", "eager ms", "", "inductor", "", "dual", "", "error of", "neutral", "cached")
    print(" " * 22 + "".join(f"{name:>9}" for name in names))
    for name, tool in TOOLS.items():
        print(f"{name:22}{_row(tool) if installed(tool.package) else '  not installed'}", flush=True)
