"""What the tests of kernels share: examples, Inductor's code, and Triton interpreted and compiled without a GPU."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from hypothesis import Phase, settings
from torch._functorch import config as functorch_config
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_map_only

Case = TypeVar("Case", bound=tuple[object, ...])
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXAMPLES = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)


def alone(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, without warnings."""
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **environment}
    command, root = [sys.executable, "-c", code], Path(__file__).parent.parent
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=quiet)


def interpret(test: Callable[[], None]) -> None:
    """Run a function of a test module by Triton's interpreter, in memory that is NaN wherever nobody wrote.

    It is chosen by the environment before triton is imported.
    """
    memory = "torch.use_deterministic_algorithms(True); assert torch.zeros(3).new_empty(3).isnan().all()"
    code = f"import torch; {memory}; from {test.__module__} import {test.__name__} as test; test()"
    done = alone(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def without_triton(code: str) -> str:
    """What code prints that runs kernels where triton is missing, which is not spoken of."""
    done = alone(f"import sys; sys.modules['triton'] = None; import torch\n{code}\n{NO_TRITON}")
    assert done.returncode == 0, done.stderr
    assert "triton" not in done.stderr.lower()
    return done.stdout.strip()


NO_TRITON = "assert not [n for n in sys.modules if n.startswith('dllm_compile.') and n.endswith('_triton')]"


def inductor(step: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What a step returns that Inductor compiled, and the code."""
    # the cache of traced graphs knows an op by its name, so that it would outlive a change of the reference
    with functorch_config.patch(enable_autograd_cache=False), torch.no_grad():
        result, (code,) = run_and_get_code(torch.compile(step, fullgraph=True), *arguments)
    return result, code


def buffers(code: str) -> list[int]:
    """Elements of each tensor that Inductor's code makes."""
    shapes = re.findall(r"= empty_strided_cpu\(\(([\d, ]*)\)", code)
    return [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in shapes]


def built(
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    capability: int,
    options: dict[str, int],
    aligned: Iterable[str] = (),
) -> Any:
    """A Triton kernel compiled for a GPU that need not be there.

    Args:
        kernel: a function of Triton's.
        kinds: of its arguments; the others are int64.
        constants: arguments known when it is compiled.
        capability: of the GPU, as 90.
        options: of Triton.
        aligned: arguments that are multiples of 16.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {n: "constexpr" if n in constants else kinds.get(n, "i64") for n in kernel.arg_names}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, kinds, constants, hints)
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        done = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert done.asm["cubin"]
    return done


def on_gpu(case: Case) -> Case:
    """The same with its tensors there."""
    away: Case = tree_map_only(torch.Tensor, torch.Tensor.cuda, case)
    return away


def grids(graph: torch.fx.Graph) -> list[Any]:
    """Grids of the Triton kernels that a graph calls."""
    kernels = graph.find_nodes(op="call_function", target=torch.ops.higher_order.triton_kernel_wrapper_mutation)
    return [node.kwargs["grid"] for node in kernels]
