"""Everything private of PyTorch that the package uses: nothing else imports an underscored name of it.

PyTorch may change these without notice. Each was read in torch 2.11 and 2.13, the first and the last version that the
package allows; where the two differ, a function here hides it. Nothing of the package is imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch._C import _autograd, _functorch
from torch._C._autograd import DeviceType as DeviceType  # where an event of the profiler happened
from torch._C._functorch import get_unwrapped as get_unwrapped  # the tensor that one of a ``vmap`` stands for
from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor  # whether there is one
from torch._guards import CompileContext as CompileContext  # which graph of which function Dynamo makes now
from torch._logging._internal import LazyTraceHandler, trace_log
from torch._logging._internal import trace_structured as trace_structured  # a record for TORCH_TRACE and tlparse
from torch._ops import OpOverload as OpOverload  # one form of an operation
from torch._ops import OpOverloadPacket as OpOverloadPacket  # all forms of an operation
from torch._subclasses.fake_tensor import DataDependentOutputException as DataDependentOutputException  # of ``item()``
from torch._subclasses.fake_tensor import DynamicOutputShapeException as DynamicOutputShapeException  # of ``nonzero()``
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # a tensor without numbers
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode  # makes them, and what is computed of them
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import DimDynamic as DimDynamic  # whether a size may change
from torch.fx.experimental.symbolic_shapes import (
    GuardOnDataDependentSymNode as GuardOnDataDependentSymNode,  # a branch on a number that depends on values
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv  # symbols of sizes, and what is assumed of them
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every ATen call
from torch.utils._python_dispatch import (
    is_traceable_wrapper_subclass as is_traceable_wrapper_subclass,  # a tensor made of others: a quantized weight
)
from torch.utils._pytree import tree_any as tree_any  # whether one value in tuples, lists and dictionaries is such
from torch.utils._pytree import tree_leaves as tree_leaves  # all values in them
from torch.utils._pytree import tree_map as tree_map  # the same, of other values

profiler_enabled: Callable[[], bool] = _autograd._profiler_enabled
"""Whether a profiler records."""
vmap_depth: Callable[[], int] = _functorch.get_dynamic_layer_stack_depth
"""How many transformations of functions, such as ``vmap``, are under way."""
leave_vmaps: Callable[[int], object] = _functorch.pop_dynamic_layer_stack_and_undo_to_depth
"""End those above a depth, which an error left under way."""
compile_lock: AbstractContextManager[object]
"""Dynamo's, as one thread at a time compiles."""
cached_backends: dict[int, Callable[..., Any]]
"""Whose ``reset`` Dynamo's reset calls, by id."""
ConstantSource: Callable[..., Any]
"""Where a size comes from that is no input's."""
counters: dict[str, Any]
"""What Dynamo counts, its graphs among it."""
get_compilation_metrics: Callable[[], list[Any]]
"""What Dynamo notes of each function, with its failure."""
graph_break_reasons: list[Any]
"""All breaks so far, with their stacks."""
compile_fx: Callable[..., Callable[..., Any]]
"""Inductor: a graph and examples to a function."""
clear_caches: Callable[[], None]
"""Inductor forgets what it compiled in this process."""
fresh_cache: Callable[[], AbstractContextManager[object]]
"""And has an empty folder."""
graph_break: Callable[[], None]
"""Breaks the graph where Dynamo traces it."""
TorchDynamoException: type[Exception]
"""Dynamo cannot trace something whole."""
dynamo_config: Any
"""Read and written: ``ignore_logging_functions``."""
inductor_config: Any
"""Read: ``pre_grad_fusion_options``; patched: ``unsafe_marked_cacheable_functions``, ``cpp.vec_isa_ok``."""
LATE = {
    "compile_lock": "torch._dynamo.convert_frame",
    "cached_backends": "torch._dynamo.eval_frame",
    "ConstantSource": "torch._dynamo.source",
    "counters": "torch._dynamo.utils",
    "get_compilation_metrics": "torch._dynamo.utils",
    "graph_break_reasons": "torch._dynamo.utils",
    "TorchDynamoException": "torch._dynamo.exc",
    "graph_break": "torch._dynamo",
    "dynamo_config": "torch._dynamo.config",
    "compile_fx": "torch._inductor.compile_fx",
    "clear_caches": "torch._inductor.utils",
    "fresh_cache": "torch._inductor.utils",
    "inductor_config": "torch._inductor.config",
}
"""Modules of names that are read as ``compat.NAME``: Dynamo and Inductor take 1.5 seconds to import, and are imported
where the first of these is read. A configuration is the module itself.
"""
LOG_OF_OPERATIONS = "torch._library.triton"
"""The logger of ``torch.library.triton_op``."""
ENTER_AUTOCAST, EXIT_AUTOCAST = "_enter_autocast", "_exit_autocast"
"""Names of the functions that Dynamo writes for ``with torch.autocast``."""
NO_EFFECT = {"_log_api_usage_once", "_set_grad_enabled", ENTER_AUTOCAST, EXIT_AUTOCAST}
"""Names of functions in Dynamo's graphs that compute nothing."""
NAMED = "_parameters", "_buffers", "_modules"
"""Attributes of a module that hold others by name."""
version: Callable[[torch.Tensor], int] = attrgetter("_version")
"""How often a tensor was written to where autograd sees it; not of inference tensors."""


if not TYPE_CHECKING:  # or every other name would be taken for one of these

    def __getattr__(name: str) -> Any:
        """A name of :data:`LATE`, from its module; looked up once."""
        if name not in LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(LATE[name])
        globals()[name] = found = module if name.endswith("_config") else getattr(module, name)
        return found


def storage_id(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage itself, which fake tensors have, too, and those that share memory share."""
    return int(tensor.untyped_storage()._cdata)


def storage_owners(storage: torch.UntypedStorage) -> int:
    """How many tensors and other owners a storage has, in C++."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def shared_until_written(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over the same memory; whichever is written to first, in any way, gets memory of its own.

    numpy, compiled code and DLPack count as writing, as they ask for an address. PyTorch cannot enlarge its storage.
    """
    return torch._lazy_clone(tensor)


def address(tensor: torch.Tensor) -> int:
    """Where the numbers of a tensor are; unlike ``data_ptr()``, this does not end what it shares until a write, which
    only tensors on a CPU do.
    """
    if tensor.device.type != "cpu":
        return tensor.data_ptr()
    begin = int(torch._C._data_address(tensor))  # type: ignore[attr-defined]
    return begin + int(tensor.storage_offset()) * tensor.element_size()


def can_share_until_written(tensor: torch.Tensor) -> bool:
    """Whether :func:`shared_until_written` takes a tensor: not one over memory of numpy, a file or other processes."""
    storage = tensor.untyped_storage()
    return storage.resizable() and not storage.is_shared()


def is_shared_until_written(tensor: torch.Tensor) -> bool:
    """Whether a tensor of :func:`shared_until_written` still has the memory that it was made of."""
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def schema(func: Any) -> Any:
    """Names, defaults and writes of the arguments of one form of an operation; ``None`` for one of higher order."""
    return getattr(func, "_schema", None)


def traced() -> bool:
    """Whether :func:`trace_structured` has a reader: torch removes its handler where there is none.

    Others, such as pytest's, sit there too.
    """
    return any(isinstance(handler, LazyTraceHandler) for handler in trace_log.handlers)


def profiled() -> bool:
    """Whether a profiler of PyTorch runs."""
    return torch.autograd.profiler._is_profiler_enabled


def is_dtensor(value: Any) -> bool:
    """Whether a value is a ``DTensor``. Its module, which takes a while to import, is not imported for the answer."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def all_reduce(x: torch.Tensor, how: str, group: str) -> torch.Tensor:
    """Begin to reduce a contiguous tensor over the ranks of a process group; see :func:`wait_tensor`."""
    begun: torch.Tensor = torch.ops._c10d_functional.all_reduce(x, how, group)
    return begun


def all_gather(x: torch.Tensor, count: int, group: str) -> torch.Tensor:
    """Begin to join a contiguous tensor of each of ``count`` ranks along its first dimension."""
    begun: torch.Tensor = torch.ops._c10d_functional.all_gather_into_tensor(x, count, group)
    return begun


def group_size(group: str) -> int:
    """How many ranks a process group has, by its name."""
    size: Callable[[Any], int] = torch.distributed.distributed_c10d._get_group_size_by_name
    return size(group)


def wait_tensor(begun: torch.Tensor) -> torch.Tensor:
    """Wait for :func:`all_reduce` or :func:`all_gather`, and return its result."""
    done: torch.Tensor = torch.ops._c10d_functional.wait_tensor(begun)
    return done


def uncompiled(model: Any) -> Any:
    """The module that ``torch.compile`` was given, where ``model`` is what it returned; else ``model``."""
    return getattr(model, "_orig_mod", model)


def is_erased(node: torch.fx.Node) -> bool:
    """Whether a node was taken out of its graph."""
    return node._erased


def of_values(value: Any) -> bool:
    """Whether a size of a tensor that Dynamo traced, or a number, depends on the values of a tensor."""
    leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, (torch.Tensor, torch.SymInt, torch.SymFloat))]
    return any(bool(symbolic_shapes.free_unbacked_symbols(leaf)) for leaf in leaves)


def of_module(node: torch.fx.Node) -> bool:
    """Whether an input of a graph that Dynamo traced is a parameter or buffer of a module."""
    guarded = getattr(getattr(node.meta.get("grapharg"), "source", None), "guard_source", None)
    return "NN_MODULE" in str(guarded() if callable(guarded) else guarded)


def likely(number: torch.SymInt) -> int:
    """The number that a symbol stands for in the example that is compiled; it stays free."""
    name = "optimization_hint" if hasattr(symbolic_shapes, "optimization_hint") else "size_hint"  # until torch 2.12
    return int(getattr(symbolic_shapes, name)(number))
