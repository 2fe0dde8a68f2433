"""Recorded calls: a graph that replays on the CPU stands in for CUDA's, so that a recording reads its own alone."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile.runtime import recordings, session
from dllm_compile.runtime.ids import positions

from . import loops, models, small_model, test_layers_alone
from .grids import in_turn
from .recorded_calls import Graph
from .rounding import roundings
from .under_way import all_under_way

pytestmark = pytest.mark.shares_graphs

Logits = list[torch.Tensor]

PROMPT, RESPONSE, BLOCK = 9, 24, 8
ES: dict[str, Any] = {"row_shares": (0.5,), "row_depths": (0.5,), "block_length": BLOCK}
METHODS: dict[str, dict[str, Any]] = {
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK},
    "prefix": {"method": "fast-dllm", "cache": "prefix", "block_length": BLOCK},
    "intervals": {"prompt_interval": 50, "response_interval": 7},
    "flashblock": {"method": "flashblock", "block_length": BLOCK},
    "eviction": {"method": "sparse-dllm", "block_length": BLOCK},
    "eviction of the prompt": {"method": "dllm-cache", "keep_ratio": 0.5},
    "saliency": {"method": "dyllm", "saliency_threshold": 0.9, "shift": False},
    "all three": {"method": "sparse-dllm", "saliency_threshold": 0.9, "full_steps": 1, "block_length": BLOCK},
    "decoded": {"method": "dkv-cache", "shift": False},
    "skipping": {**ES, "method": "es-dllm", "refresh_interval": 9},
    "skipping and all three": {**ES, "method": "sparse-dllm", "saliency_threshold": 0.9, "full_steps": 1},
}


def denoised(model: torch.nn.Module, batch: int, extra: dict[str, Any] | None = None, **options: Any) -> Logits:
    """Logits of the masked rows of each call of two generations."""
    call, out = models.compiled_loop(model, **options), []
    for seed in (1, 2):
        x = models.start(PROMPT, RESPONSE, batch, seed).to(next(model.parameters()).device)

        def logits(ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = call(input_ids=ids, **(extra or {})).logits
            out.append(found[ids == models.MASK].clone())
            return found

        with torch.no_grad():
            for _ in loops.llada(logits, x, PROMPT, steps=RESPONSE, block_length=BLOCK, mask_id=models.MASK):
                pass
    return out


def padding() -> torch.Tensor:
    """A mask that hides the first tokens of the second sequence."""
    mask = torch.ones(2, PROMPT + RESPONSE, dtype=torch.int64)
    mask[1, :3] = 0
    return mask


def same(got: Logits, want: Logits) -> bool:
    """Up to rounding, call for call."""
    return all(roundings(mine, theirs) <= 64 for mine, theirs in zip(got, want, strict=True) if theirs.numel())


@pytest.mark.parametrize(("options", "batch"), in_turn(METHODS.values(), [1, 2]), ids=METHODS)
@pytest.mark.usefixtures("recording")
def test_recorded_calls_equal_those_that_are_made(options: dict[str, Any], batch: int) -> None:
    model = models.build("llama", num_hidden_layers=2)
    want = denoised(model, batch, **options)
    assert Graph.played == 0
    assert dllm_compile.stats(model)["cuda_graphs"] == {}
    assert same(denoised(model, batch, cuda_graphs=True, **options), want)
    assert dllm_compile.stats(model)["cuda_graphs"]["replayed"] == Graph.played > 0


@pytest.mark.usefixtures("recording")
def test_padding_masks_and_positions_are_copied_to_the_recording() -> None:
    """By code that Inductor compiled for their strides."""
    model, mask = models.build("llama", num_hidden_layers=2), padding()
    extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    options = {"lowering": "inductor", **METHODS["dual"]}
    want = denoised(model, 2, extra, **options)
    assert same(denoised(model, 2, extra, cuda_graphs=True, **options), want)
    assert Graph.played > RESPONSE // 2


@pytest.mark.usefixtures("recording")
def test_calls_with_arguments_that_overlap_themselves_are_not_recorded() -> None:
    """A copy has other strides, which the code is not compiled for."""
    model, places = models.build("llama", num_hidden_layers=2), torch.arange(PROMPT + RESPONSE)
    extra = {"attention_mask": padding(), "position_ids": places[None].expand(2, -1)}
    options = {"lowering": "inductor", **METHODS["dual"]}
    want = denoised(model, 2, extra, **options)
    with pytest.warns(UserWarning, match="without a CUDA graph, as an argument overlaps itself in memory") as said:
        assert same(denoised(model, 2, extra, cuda_graphs=True, **options), want)
    assert Graph.played == 0
    (why,) = dllm_compile.stats(model)["cuda_graphs"].keys() - {"the first of its kind"}
    assert dllm_compile.stats(model)["cuda_graphs"][why] > len(said) == 1


@pytest.mark.usefixtures("recording")
def test_numbers_that_dynamo_hands_over_as_tensors_are_none_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are on the CPU wherever the model is, and the graph is analyzed for their values."""
    given: list[torch.Tensor] = []
    fits = recordings.recordable
    monkeypatch.setattr(recordings, "recordable", lambda args, device: bool(given.extend(args)) or fits(args, device))
    model = models.build("llama", num_hidden_layers=1)
    options = {"lowering": "eager", "mask_id": models.MASK, "shift": False, "cuda_graphs": True, **METHODS["dual"]}
    call, x = torch.compile(model, backend="dllm", dynamic=True, options=options), models.start(PROMPT, BLOCK)
    with torch.no_grad(), dllm_compile.loop():
        for at in range(PROMPT, PROMPT + BLOCK):
            call(input_ids=x)
            x = x.clone()
            x[:, at] = 1 + at % 2
    assert Graph.played > 2
    assert given
    assert all(each.dim() for each in given)


@pytest.mark.usefixtures("recording")
def test_parts_of_a_model_are_not_recorded() -> None:
    model = test_layers_alone.Model().double().eval()
    options = {**test_layers_alone.CACHED, "cuda_graphs": True}
    call = models.compiled_loop(model, **options)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="without a CUDA graph, as the model is more than one graph"):
            got = test_layers_alone.run(call, "mask-test")
        want = test_layers_alone.run(models.compiled_loop(model, **test_layers_alone.CACHED), "mask-test")
    assert same(got, want)
    assert Graph.played == 0


@pytest.mark.usefixtures("recording")
def test_recorded_calls_of_generate_equal_those_that_are_made() -> None:
    model, x = small_model.build(), models.start(PROMPT, 0)
    settings: dict[str, Any] = {"gen_length": RESPONSE, "block_length": BLOCK, "mask_id": models.MASK, "cache": "dual"}
    want = dllm_compile.generate(model, x, lowering="eager", **settings)
    assert Graph.played == 0
    got = dllm_compile.generate(model, x, lowering="eager", cuda_graphs=True, **settings)
    assert Graph.played > RESPONSE // 2
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["saliency", "all three"])
@pytest.mark.usefixtures("recording")
def test_a_call_with_too_many_salient_rows_is_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        session.Session, "salient_capacity", lambda self, step: self.salient_capacities.get(step.sizes.get("active"), 2)
    )
    monkeypatch.setattr(session, "LEAST_CAPACITY", 2)
    model, options = models.build("llama", num_hidden_layers=2), METHODS[name]
    want = denoised(model, 2, **options)
    overflows = dllm_compile.stats(model)["overflows"]
    assert overflows > 0
    assert same(denoised(model, 2, cuda_graphs=True, **options), want)
    assert Graph.played > 0
    assert dllm_compile.stats(model)["overflows"] == 2 * overflows


@pytest.mark.usefixtures("recording")
def test_a_call_that_cannot_be_recorded_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(body: Callable[[], Any], device: torch.device, pool: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(recordings, "capture", capture)
    model = small_model.build()
    want = denoised(model, 1, **METHODS["dual"])
    with pytest.warns(UserWarning, match="without a CUDA graph, as one cannot be recorded: operation not permitted"):
        assert same(denoised(model, 1, cuda_graphs=True, **METHODS["dual"]), want)


def test_recordings_do_not_keep_the_model(recording: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(body: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Any]:
        made = body()
        return made, SimpleNamespace(replay=lambda: None, pool=lambda: None)  # holds nothing, as CUDA's does

    monkeypatch.setattr(recordings, "capture", capture)
    model = small_model.build()
    denoised(model, 1, cuda_graphs=True, **METHODS["dual"])
    mine = [each for each in all_under_way() if each.recordings.kinds][-1]
    held = list(mine.recordings.kinds.values())
    assert any(isinstance(recording, recordings.Recording) for recording in held)
    gone = weakref.ref(model.head.weight)
    torch._dynamo.reset()
    del model, mine
    gc.collect()
    assert gone() is None


def test_nothing_is_recorded_on_a_cpu() -> None:
    model = small_model.build()
    got = denoised(model, 1, cuda_graphs=True, **METHODS["dual"])
    assert all(not each.recordings.kinds for each in all_under_way())
    assert all(map(torch.equal, got, denoised(model, 1, **METHODS["dual"])))


def test_positions_come_in_multiples_up_to_all_rows() -> None:
    marked = torch.tensor([[1, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
    assert positions(marked, multiple=4).tolist() == [[0, 3, 4, 7], [6, 7, 7, 7]]
    assert positions(marked, multiple=8).shape == (2, 7)
    assert positions(~marked, multiple=4).shape == (2, 7)
    assert positions(marked & False, 2, multiple=4).shape == (2, 0)
    assert positions(marked & False, 2, empty=False, multiple=4).shape == (2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_graphs_of_cuda_equal_launches(options: dict[str, Any], lowering: str) -> None:
    model = models.build("llama").cuda()
    want = denoised(model, 2, lowering=lowering, **options)
    assert same(denoised(model, 2, lowering=lowering, cuda_graphs=True, **options), want)
    recorded = [recording for each in all_under_way() for recording in each.recordings.kinds.values()]
    assert any(isinstance(recording, recordings.Recording) for recording in recorded)
