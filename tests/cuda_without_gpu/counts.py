"""What a graph costs to launch, read in the Python that Inductor generated for it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counts:
    """Launches of one graph.

    Attributes:
        triton: generated kernels, and ours.
        products: matrix products of the library.
        extern: what else is called by name, and how often.
        buffers: shape and dtype of each tensor that is made.
    """

    triton: int
    products: int
    extern: Counter[str] = field(hash=False)
    buffers: tuple[tuple[str, str], ...] = ()

    @property
    def launches(self) -> int:
        """At least: a call by name may launch several."""
        return self.triton + self.products + sum(self.extern.values())

    @property
    def beside(self) -> str:
        """What is launched beside Triton's kernels."""
        named = [f"{n} {name}" if n > 1 else name for name, n in sorted(self.extern.items())]
        return " + ".join([f"{self.products} mm", *named])


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
SHORT = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_efficient_attention": "efficient",
    "_efficient_attention_forward": "efficient",
}
ARGUMENT = r"^(?:\w+ = )?(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.[\w.]+)\("


def counted(code: str) -> Counts:
    """What Inductor's code of one graph launches."""
    body = code[code.index("def call(self, args)") : code.index("runner = Runner")]
    lines = [line.strip() for line in body.splitlines()]
    triton = sum(".run(" in line and "stream=" in line for line in lines)
    names = [found.group(1) for line in lines if (found := re.match(ARGUMENT, line))]
    calls = Counter(_short(name) for name in names)
    products = sum(calls.pop(name, 0) for name in PRODUCTS)
    made = re.findall(r"empty_strided_cuda\((\([^)]*\)), \([^)]*\), (torch\.\w+)\)", body)
    return Counts(triton, products, calls, tuple(made))


def _short(name: str) -> str:
    """``torch.ops.aten.topk.default`` as ``topk``."""
    parts = [part for part in name.split(".") if part not in ("torch", "ops", "aten", "extern_kernels", "default")]
    found = parts[0] if parts else name
    return SHORT.get(found, found)
