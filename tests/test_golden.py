"""Traces of the authors' own code, replayed through ``torch.compile(model, backend="dllm")`` and a plain loop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping

import pytest
import torch

from dllm_compile import debug

from . import golden_models, loops, shared
from .grids import in_turn
from .recorded_calls import Graph
from .under_way import under_way

pytestmark = pytest.mark.shares_graphs


def run(trace: golden_models.Trace, logits: loops.Logits) -> Iterator[torch.Tensor]:
    """The loop that a trace was recorded with."""
    settings = trace.settings
    x = trace.tensors["tokens"][0].clone().long()
    prompt = trace.tensors["prompt"].shape[1]
    if trace.name.startswith("dream_dyllm"):
        return loops.llada(
            shifted(trace, logits),
            x,
            prompt,
            steps=settings["steps"],
            block_length=settings["block_size"],
            mask_id=trace.mask_id,
            alg="entropy",
        )
    if trace.name.startswith("llada"):
        return loops.llada(
            logits,
            x,
            prompt,
            steps=settings["steps"],
            block_length=settings["block_length"],
            mask_id=trace.mask_id,
            cfg_scale=settings.get("cfg_scale", 0.0),
        )
    return loops.dream(logits, x, steps=settings["steps"], alg=settings["alg"], mask_id=trace.mask_id)


def shifted(trace: golden_models.Trace, logits: loops.Logits) -> loops.Logits:
    """Logits whose row ``i`` predicts token ``i``.

    In steps that leave out the prompt DyLLM's authors have no row before the response, and read its first row twice.
    """
    rows, prompt, step = trace.tensors["rows"], trace.tensors["prompt"].shape[1], itertools.count()

    def moved(x: torch.Tensor) -> torch.Tensor:
        given, out = rows[next(step)], logits(x)
        before = torch.cat([out[:, :1], out[:, :-1]], 1)
        if not given[prompt - 1]:
            before[:, prompt] = out[:, prompt]
        return before

    return moved


def replay(
    name: str, options: dict[str, object], salient: golden_models.Salient | None = None, device: str = "cpu"
) -> None:
    trace = golden_models.trace(name)
    model = golden_models.model(trace.meta["model"])
    model = model if device == "cpu" else copy.deepcopy(model).to(device)
    if options.get("lowering") == "eager":
        compiled = shared.compiled(model, dynamic=True, **options)
    else:
        compiled = torch.compile(model, backend="dllm", options=options)
    seen: list[torch.Tensor] = []

    def logits(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = compiled(input_ids=x.to(device)).logits.cpu()
        check_step(trace, len(seen), x, out, ran[-1].selected, CLOSE[device])
        if salient is not None:
            golden_models.check_salient(trace, salient, len(seen))
        return out

    with torch.no_grad(), debug.steps() as ran:  # a call that repeats the one before computes nothing
        for tokens in run(trace, logits):
            seen.append(tokens)
            assert torch.equal(tokens, trace.tensors["tokens"][len(seen)].long()), f"tokens after step {len(seen) - 1}"
    assert len(seen) == trace.tensors["tokens"].shape[0] - 1 == int(trace.tensors["nfe"])


CLOSE = {"cpu": 1e-4, "cuda": 1e-3}
"""How close logits of up to 30 are to the recorded ones. Rotary tables are float32: a rounding of theirs, which another
processor makes differently, moves the logits of ``llada_a`` by 7e-5."""


def check_step(
    trace: golden_models.Trace,
    step: int,
    x: torch.Tensor,
    out: torch.Tensor,
    selected: Mapping[int, torch.Tensor],
    close: float,
) -> None:
    """Logits of the recorded steps on the rows a sampler reads; the rows each layer chose."""
    want = trace.tensors.get(f"logits_step_{step}")
    if want is not None:
        shift = trace.name.startswith("dream")
        masked = x == trace.mask_id
        rows = torch.cat([masked[:, 1:], masked[:, :1] & False], 1) if shift else masked
        given = trace.tensors["rows"][step].bool()
        rows = rows[:, given]
        assert (out[:, given][rows] - want[rows]).abs().max() < close
    if "kept_index" in trace.tensors:
        check_kept(trace, step)
    if "_dkv__" in trace.name:
        check_computed(trace, step)
    if "update_index" not in trace.tensors:
        return
    chosen, gap = trace.tensors["update_index"][step], trace.tensors["update_gap"][step]
    prompt = trace.tensors["prompt"].shape[1]
    for layer in range(chosen.shape[0]):
        if not chosen[layer].numel() or chosen[layer].min() < 0 or gap[layer] <= 1e-8:
            continue
        got = selected[layer].cpu().sort(1).values - prompt
        assert torch.equal(got, chosen[layer].long()), f"rows chosen at step {step} in layer {layer}"


def check_kept(trace: golden_models.Trace, step: int) -> None:
    """Positions that each layer keeps, from the second step of a block on; ties are broken as the authors' were."""
    per_block = trace.settings["steps"] // (trace.settings["gen_length"] // trace.settings["block_length"])
    block, at = divmod(step, per_block)
    running = under_way(step)
    if at == 0 or per_block <= 2:
        return
    want, tied = trace.tensors["kept_index"][block], trace.tensors["kept_tie"][block]
    count = running.step.sizes["kept"]  # the rows of the block are behind them
    got = [state[-1][:, :count].cpu().sort(1).values[0] for state in running.layers.values()]
    assert len(got) == len(want)
    for layer, positions in enumerate(got):
        assert tied[layer] or torch.equal(positions, want[layer].long()), f"kept at step {step} in layer {layer}"


def check_computed(trace: golden_models.Trace, step: int) -> None:
    """Rows that a step computes."""
    running = under_way(step)
    want = trace.tensors["rows"][step].bool()
    got = golden_models.computed(running.step, want.shape[0])
    assert torch.equal(got, want), f"rows computed at step {step}"


def cache_options(name: str) -> dict[str, object]:
    settings = golden_models.trace(name).settings
    kept = ("prompt_interval_steps", "gen_interval_steps", "transfer_ratio")
    return {name: settings[name] for name in kept}


@pytest.mark.parametrize("name", golden_models.names("llada_dllmcache") + golden_models.names("dream_dllmcache"))
def test_dllm_cache_repeats_its_authors_code(name: str) -> None:
    replay(name, {**cache_options(name), "lowering": "eager"})


@pytest.mark.parametrize("name", golden_models.names("llada_vanilla") + golden_models.names("dream_vanilla"))
def test_exact_repeats_the_plain_loops(name: str) -> None:
    replay(name, {"method": "exact", "lowering": "eager"})


def block_options(name: str) -> dict[str, object]:
    """Fast-dLLM's function names its cache."""
    trace = golden_models.trace(name)
    caches = {"generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual", "generate": "none"}
    block_length = trace.settings["block_length"]
    cache = caches[trace.meta["function"]]
    return (
        {"method": "fast-dllm", "cache": cache, "block_length": block_length}
        if cache != "none"
        else {"method": "exact"}
    )


FIXED_SCHEDULE = [
    name
    for name in golden_models.names("llada_fastdllm")
    if golden_models.trace(name).settings.get("threshold") is None
]


@pytest.mark.parametrize(("name", "shift"), in_turn(FIXED_SCHEDULE, [None, False]))
def test_fast_dllm_repeats_its_authors_code(name: str, shift: bool | None) -> None:
    replay(name, {**block_options(name), "shift": shift, "lowering": "eager"})


def eviction_options(name: str) -> dict[str, object]:
    settings = golden_models.trace(name).settings
    return {"method": "sparse-dllm", **{key: settings[key] for key in ("keep_ratio", "kernel_size", "block_length")}}


@pytest.mark.parametrize(("name", "shift"), in_turn(golden_models.names("llada_sparse"), [None, False]))
def test_sparse_dllm_repeats_its_authors_code(name: str, shift: bool | None) -> None:
    replay(name, {**eviction_options(name), "shift": shift, "lowering": "eager"})


def decoded_options(name: str) -> dict[str, object]:
    """dKV-Cache has other names and another beginning in LLaDA and in Dream; Dream's ``prefill`` keeps the prompt."""
    settings = golden_models.trace(name).settings
    if name.startswith("llada"):
        kept = ("cache_reloading_step", "block_length")
        return {"method": "dkv-cache", "shift": False, **{key: settings[key] for key in kept}}
    if settings["cache_type"] == "prefill":
        return {"method": "dllm-cache", "prompt_interval": 10**6, "response_interval": 1, "shift": True}
    return {"method": "dkv-cache", "delay": 0, "shift": True, "cache_steps": settings["cache_steps"]}


DECODED = [n for n in golden_models.names("llada_dkv") + golden_models.names("dream_dkv") if "greedy" not in n]


@pytest.mark.parametrize("name", DECODED)
def test_dkv_cache_repeats_its_authors_code(name: str) -> None:
    replay(name, {**decoded_options(name), "lowering": "eager"})


def saliency_options(name: str) -> dict[str, object]:
    settings = golden_models.trace(name).settings
    kept = ("num_full_steps", "response_only", "whole_interval")
    return {
        "method": "dyllm",
        "saliency_threshold": settings["threshold"],
        **{name: settings[name] for name in kept},
    }


@pytest.mark.parametrize(("name", "shift"), in_turn(golden_models.names("llada_dyllm"), [None, False]))
def test_dyllm_repeats_its_authors_code(name: str, shift: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    salient = golden_models.noted_salient(monkeypatch)
    replay(name, {**saliency_options(name), "shift": shift, "lowering": "eager"}, salient)


@pytest.mark.parametrize(
    ("name", "shift"),
    [
        *((name, None) for name in golden_models.names("dream_dyllm")),
        # shift=True counts the row before the response as part of it, which the authors do not
        *((name, True) for name in golden_models.names("dream_dyllm") if name.endswith("_whole")),
    ],
)
def test_dyllm_on_dream_repeats_its_authors_code(
    name: str, shift: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    salient = golden_models.noted_salient(monkeypatch)
    replay(name, {**saliency_options(name), "shift": shift, "lowering": "eager"}, salient)


OPTIONS = {
    "llada_dllmcache": cache_options,
    "dream_dllmcache": cache_options,
    "llada_fastdllm": block_options,
    "llada_sparse": eviction_options,
    "llada_dkv": decoded_options,
    "llada_dyllm": saliency_options,
}


def options_of(name: str) -> dict[str, object]:
    """Those that a trace was recorded with."""
    return next(of(name) for kind, of in OPTIONS.items() if name.startswith(kind))


@pytest.mark.parametrize(
    "name",
    [
        "llada_dllmcache__llada_a__kp7_kg3_r0.25",
        "llada_fastdllm__llada_a__prefix_p13_g32_b8_s16",
        "llada_dkv__llada_a__decode_p13_g32_b16_s32_c2",
        "llada_dyllm__llada_a__p21_g32_b16_s32_t0.9_f1",
        "llada_sparse__llada_g__p13_g32_b16_s16_k1_r0.5",
    ],
)
def test_compiled_by_inductor(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method, most on one model: what all of them compile is compiled once.

    Short sequences: plain Inductor too is further from eager than ``CLOSE`` at 69 tokens, by its float32 rotary tables.
    """
    salient = golden_models.noted_salient(monkeypatch) if "dyllm" in name else None
    replay(name, options_of(name), salient)


# a GPU breaks ties of what to keep as its topk does, not as the authors' processor did
UNTIED = [
    name
    for kind in OPTIONS
    for name in golden_models.names(kind)
    if not golden_models.trace(name).tensors.get("kept_tie", torch.zeros(1)).any()
    and (name in FIXED_SCHEDULE or not name.startswith("llada_fastdllm"))
    and "greedy" not in name
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("name", "lowering"), in_turn(UNTIED, ["eager", "inductor"]))
def test_traces_are_repeated_on_a_gpu(name: str, lowering: str) -> None:
    replay(name, {**options_of(name), "lowering": lowering, "cuda_graphs": True}, device="cuda")


@pytest.mark.parametrize(
    "name", [*golden_models.names("llada_dyllm")[::2], *golden_models.names("llada_dllmcache")[::4]]
)
@pytest.mark.usefixtures("recording")
def test_recorded_calls_repeat_their_authors_code(name: str) -> None:
    replay(name, {**options_of(name), "lowering": "eager", "cuda_graphs": True})
    assert Graph.played > 0
