"""``bench --kernels``: each operation alone, against what samplers and models write in its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

from dllm_compile.kernels import delta_attention as delta_op
from dllm_compile.kernels import sparse_attention as sparse_op
from dllm_compile.kernels.confidence import confidence

from .contest import wait
from .shape import bandwidth

CALLS = 40
ROWS, VOCABULARY = 32, 126464
HEADS, WIDTH, KEYS, BLOCK, RESPONSE, SALIENT = 32, 128, 1024, 32, 256, 26
"""Of LLaDA-8B; a block of 32, or a response of 256 with a tenth of it salient, at 1,024 tokens."""

Calls = dict[str, Callable[[], object]]


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, once warm."""
    spent = []
    for _ in range(CALLS):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        spent.append(1000 * (time.perf_counter() - begin))
    return median(spent[CALLS // 4 :])


def operations(device: torch.device) -> Iterator[tuple[str, int, Calls]]:
    """Each operation: what it is, bytes that it reads, and ways to compute it: ours, what it replaces, more."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    source = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=source, device=device, dtype=dtype)

    logits = drawn(ROWS, VOCABULARY)
    ours = torch.compile(lambda x: (found := confidence(x)).best + found.probability)
    best: Calls = {"operation": lambda: ours(logits), "float64 softmax": lambda: _softmax(logits)}
    yield f"confidence, {ROWS} rows of {VOCABULARY}", logits.nbytes, best

    key, value, block = drawn(1, HEADS, KEYS, WIDTH), drawn(1, HEADS, KEYS, WIDTH), drawn(1, HEADS, BLOCK, WIDTH)
    sparse = torch.compile(lambda q, k, v: sparse_op.sparse_attention(q, k, v, None, KEYS))
    attended: Calls = {
        "operation": lambda: sparse(block, key, value),
        "dense": lambda: scaled_dot_product_attention(block, key, value),
        "reference": lambda: sparse_op.reference(sparse_op.Arguments(block, key, value, None, KEYS)),
    }
    size = sum(x.nbytes for x in (block, key, value))
    yield f"sparse attention, {BLOCK} rows, {KEYS} keys", size, attended

    query, context, change = (drawn(1, HEADS, RESPONSE, WIDTH) for _ in range(3))
    at = torch.arange(SALIENT, device=device).unsqueeze(0)
    given = (change[:, :, :SALIENT].transpose(1, 2), at + KEYS - RESPONSE, at, context)
    delta = torch.compile(lambda q, k, v: delta_op.delta_attention(q, k, v, *given))
    corrected: Calls = {
        "operation": lambda: delta(query, key, value),
        "dense": lambda: scaled_dot_product_attention(query, key, value),
        "reference": lambda: delta_op.reference(delta_op.Arguments(query, key, value, *given)),
    }
    size = sum(x.nbytes for x in (query, key, value, *given))
    yield f"delta attention, {RESPONSE} rows, {SALIENT} salient, {KEYS} keys", size, corrected


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Best token and its probability, as samplers write it; added so that both are read."""
    best = logits.argmax(-1)
    return best + torch.softmax(logits.double(), -1).gather(-1, best.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def main(name: str) -> None:
    """Measure on a device and print."""
    device = torch.device(name)
    speed = bandwidth(device)
    threads = f", {torch.get_num_threads()} threads" if name == "cpu" else ""
    print(f"{name}{threads}, copies {speed / 1e9:.1f} GB/s")
    for what, size, calls in operations(device):
        spent = {way: milliseconds(call, device) for way, call in calls.items()}
        ours, *others = spent.values()
        ways = ", ".join(f"{way} {ms:.3f} ms" for way, ms in spent.items())
        print(f"{what}: {ways}: {others[0] / ours:.2f}x, {size / speed / ours * 1000:.2f} of copy bandwidth")
