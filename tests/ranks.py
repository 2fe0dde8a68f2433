"""What each of two processes does for :mod:`tests.test_tensor_parallel`: a Llama whole, and shared by both."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import dllm_compile
from dllm_compile.kernels import row_change

from . import loops, models, quick_inductor, shared

RANKS = 2
LAYERS = 2
PROMPT, RESPONSE, BLOCK = 9, 16, 8
VOCABULARY = 64  # both ranks have as many rows of the head
METHODS: dict[str, dict[str, Any]] = {
    "neutral": {"cache": "dual", "refresh_interval": 1},
    "fast-dllm dual": {"cache": "dual", "block_length": BLOCK},
    "fast-dllm prefix": {"cache": "prefix", "block_length": BLOCK},
    "dllm-cache": {"method": "dllm-cache", "prompt_interval": 6, "response_interval": 3},
    "sparse-dllm": {"method": "sparse-dllm", "block_length": BLOCK},
    "dyllm": {"method": "dyllm", "saliency_threshold": 0.9},
    "dkv-cache": {"method": "dkv-cache"},
    "flashblock": {"method": "flashblock", "block_length": BLOCK},
    "sparse and dyllm": {"cache": "dual", "keep_ratio": 0.5, "saliency_threshold": 0.9, "block_length": BLOCK},
}
BY_TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
"""Whether transformers shares a model as it does from then on: without gradients, sums are those of plain tensors."""
LOADED = ["neutral", "fast-dllm dual", "dllm-cache", "sparse-dllm", "dyllm"] if BY_TRANSFORMERS else []
Plan = dict[str, Any]
TABLE: Plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}
"""Each rank has the rows of some tokens."""


def plan(*more: str) -> Plan:
    """Heads and the features of the MLP are shared, and modules named in ``more``, which end in whole values."""
    found: Plan = {name: ColwiseParallel(output_layouts=Replicate()) for name in more}
    for layer in range(LAYERS):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            found[f"model.layers.{layer}.{name}"] = ColwiseParallel()
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            found[f"model.layers.{layer}.{name}"] = RowwiseParallel()
    return found


def build(name: str = "llama", mesh: DeviceMesh | None = None, shares: Plan | None = None, **more: Any) -> Any:
    """A random model; with ``mesh``, this rank's part of it."""
    model = models.build(name, **{"vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, **more})
    return model if mesh is None else parallelize_module(model, mesh, plan("lm_head") if shares is None else shares)


def run(model: Any, **options: Any) -> dict[str, Any]:
    """A loop on one model: its tokens, logits of masked rows and chosen rows at each step, and what ``stats`` says."""
    dllm_compile.reset()
    seen: list[torch.Tensor] = []
    call = shared.compiled(model, **{"lowering": "eager", "mask_id": models.MASK, **options})

    def logits(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = call(input_ids=x).logits
        seen.append(out[x == models.MASK])
        out[..., models.MASK] = -torch.inf  # where nothing is filled, all values are as they were: no row turned more
        return out

    x = models.start(PROMPT, RESPONSE)
    before = dllm_compile.stats(model)
    with torch.no_grad(), dllm_compile.debug.steps() as ran:
        given = {"steps": RESPONSE, "block_length": BLOCK, "mask_id": models.MASK}
        tokens = torch.stack(list(loops.llada(logits, x, PROMPT, **given)))
    after = dllm_compile.stats(model)
    ran_now = {name: n - before["steps"].get(name, 0) for name, n in after["steps"].items()}
    return {
        "tokens": tokens,
        "logits": seen,
        "kinds": {name: n for name, n in ran_now.items() if n},
        "chosen": [each.selected for each in ran],
        "computed": [each.computed for each in ran],
        "refused": after["refused"],
        "state_bytes": after["state_bytes"],
    }


def by_the_first(
    mesh: DeviceMesh, made: Callable[[], Any], methods: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """What :func:`run` says of each method on a whole model: the first rank runs it, and tells the others."""
    told: list[Any] = [None]
    if mesh.get_local_rank() == 0:
        model = made()
        told = [{name: run(model, **options) for name, options in methods.items()}]
    dist.broadcast_object_list(told, src=0)
    found: dict[str, dict[str, Any]] = told[0]
    return found


def methods(mesh: DeviceMesh) -> dict[str, Any]:
    """Every method on the whole model and on the shared one, which are called with the same weights."""
    part = build(mesh=mesh)
    whole = by_the_first(mesh, build, METHODS)
    found = {name: (whole[name], run(part, **options)) for name, options in METHODS.items()}
    kept, row_change.summed = row_change.summed, lambda x, group: x
    try:
        alone = run(part, **METHODS["dllm-cache"])
    finally:
        row_change.summed = kept
    return {"methods": found, "by each rank alone": alone}


def by_transformers(mesh: DeviceMesh, folder: str) -> Any:
    """A checkpoint of the model of :func:`build`, which transformers shares between ranks as it loads it."""
    if mesh.get_local_rank() == 0:
        build().save_pretrained(folder)
    dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have a configuration for it
        more = {"is_causal": False, "use_cache": False, "dtype": torch.float64}
        model = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", **more)
    return model.eval()


def compiled(mesh: DeviceMesh) -> dict[str, Any]:
    """One method as Inductor compiles it, of a model with biases, norms of queries and keys, and a shared embedding.

    Its steps are full, or select rows by what ranks sum: a step of the whole response has no other sums.
    """
    seldom = {"prompt_interval": RESPONSE, "response_interval": RESPONSE}
    options = {"method": "dllm-cache", **seldom, "lowering": "inductor"}
    alone = by_the_first(mesh, lambda: build("qwen3", attention_bias=True), {"whole": options})["whole"]
    part = build("qwen3", mesh, {**plan("lm_head"), **TABLE}, attention_bias=True)
    return {"compiled": (alone, run(part, **options))}


def disagreeing(mesh: DeviceMesh) -> dict[str, Any]:
    """What one rank alone is handed: a weight that is written to in the middle of a sequence, and other ids."""
    part = build(mesh=mesh)
    call = shared.compiled(part, lowering="eager", mask_id=models.MASK, **METHODS["fast-dllm dual"])
    x = models.start(PROMPT, RESPONSE)
    with torch.no_grad(), dllm_compile.loop(), dllm_compile.debug.steps() as ran:
        for step in range(4):
            x[:, PROMPT + step] = 5
            if step == 3 and mesh.get_local_rank() == 1:
                part.model.layers[1].mlp.up_proj.weight.to_local().mul_(1.5)
            out = call(input_ids=x).logits
        error = float((out - part(input_ids=x).logits).abs().max())
        x[0, -1] = 3 + mesh.get_local_rank()
        try:
            call(input_ids=x)
            said = ""
        except RuntimeError as failure:
            said = str(failure)
    return {"kinds": [each.name for each in ran], "error": error, "said": said}


def summing(mesh: DeviceMesh, forward: Callable[[torch.nn.Linear, torch.Tensor], torch.Tensor], shared: bool) -> Any:
    """A model whose first MLP calls ``forward`` for its last projection, shared by its inputs or whole on each rank."""
    given = plan("lm_head")
    for name in ("gate_proj", "up_proj", "down_proj")[2 if shared else 0 :]:
        del given[f"model.layers.0.mlp.{name}"]
    model = build(mesh=mesh, shares=given)
    last = model.model.layers[0].mlp.down_proj
    if shared:
        last.weight = torch.nn.Parameter(distribute_tensor(last.weight.detach(), mesh, [Shard(1)]))
    last.forward = lambda x: forward(last, x)
    return model


def sum_seen_by_a_view(last: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.linear(x, last.weight.to_local())
    early = out.view(-1)
    dist.all_reduce(out)
    return early.view(out.shape)


def sum_of_wholes(last: Any, x: torch.Tensor) -> torch.Tensor:
    out = torch.nn.functional.linear(x, last.weight)
    dist.all_reduce(out)
    return out / RANKS


def refused(mesh: DeviceMesh) -> dict[str, Any]:
    """Layouts that are not followed: why, and how far logits are from those of eager."""
    local = {f"model.layers.0.mlp.{name}": ColwiseParallel(use_local_output=False) for name in ("gate_proj", "up_proj")}
    tried = {
        "unequal": build(mesh=mesh, vocab_size=models.VOCABULARY),
        "columns": build(mesh=mesh, shares={**plan(), "lm_head": ColwiseParallel()}),
        "call": build(mesh=mesh, shares={**plan("lm_head"), **local}),
        "view": summing(mesh, sum_seen_by_a_view, shared=True),
        "wholes": summing(mesh, sum_of_wholes, shared=False),
    }
    found = {}
    for name, model in tried.items():
        dllm_compile.reset()
        x = models.start(PROMPT, RESPONSE)
        call = torch.compile(model, backend="dllm", options={"lowering": "eager", "mask_id": models.MASK})
        with torch.no_grad(), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            error = float((call(input_ids=x).logits - model(input_ids=x).logits).abs().max())
        found[name] = error, [str(each.message) for each in said if str(each.message).startswith("dllm: ")]
    return {"refused": found}


@contextmanager
def _group(rank: int, port: int) -> Iterator[DeviceMesh]:
    named = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}  # as torchrun does
    os.environ.update(named, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DLLM_DEBUG="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    try:
        yield init_device_mesh("cpu", (RANKS,))
    finally:
        dist.destroy_process_group()


def work(rank: int, port: int, folder: str) -> None:
    """Do everything, and leave what came of it in a file of ``folder``."""
    shared.MODULES[:] = [__name__]
    quick_inductor.begin()
    parts: tuple[Callable[[DeviceMesh], dict[str, Any]], ...] = (methods, compiled, disagreeing, refused)
    with _group(rank, port) as mesh:
        found: dict[str, Any] = {}
        for part in parts:
            torch._dynamo.reset()
            found |= part(mesh)
        if LOADED:
            torch._dynamo.reset()
            model = by_transformers(mesh, f"{folder}/model")
            whole = {name: found["methods"][name][0] for name in LOADED}
            found["loaded"] = {name: (whole[name], run(model, **METHODS[name])) for name in LOADED}
    torch.save(found, f"{folder}/{rank}.pt")
