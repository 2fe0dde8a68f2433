"""``warm`` compiles what the first request would have compiled."""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import dllm_compile
from dllm_compile.backend import Backend
from dllm_compile.runtime import session, unit_code
from dllm_compile.runtime.programs import MOST

from . import models, small_model
from .models import MASK

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = {
    "method": "fast-dllm",
    "cache": "dual",
    "block_length": 4,
    "lowering": "eager",
    "mask_id": MASK,
}


def frames() -> int:
    return int(counters["frames"]["ok"])


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_compiled_behind_it(batch: int) -> None:
    model = models.build("llama", num_hidden_layers=2)
    told = dllm_compile.warm(model, 9, 8, batch, **SETTINGS)
    assert {"full", "block", "head"} <= told.compiled.keys()
    assert told.steps.keys() == {"full", "block"}
    assert "'block'" in str(told)
    assert dllm_compile.stats(model)["state_bytes"] == 0
    before = frames()
    with mock.patch.object(unit_code, "lower", side_effect=AssertionError):
        for prompt, response in ((13, 8), (21, 12)):
            dllm_compile.generate(model, models.start(prompt, 0, batch), gen_length=response, **SETTINGS)
    assert frames() == before
    again = dllm_compile.warm(model, 9, 8, batch, **SETTINGS)
    assert not again.compiled
    assert "nothing new" in str(again)


def test_six_graphs_make_a_whole_generation() -> None:
    """Of a model of any number of layers: stem, full layer, head, decision, partial layer, and the head behind it."""
    dllm_compile.reset()
    told = dllm_compile.warm(models.build("llama", num_hidden_layers=2), 9, 8, threshold=0.9, **SETTINGS)
    assert sum(told.compiled.values()) == 6, told


def test_a_machine_that_is_given_the_artifacts_compiles_nothing(tmp_path: Path) -> None:
    """PyTorch's cache artifacts hold all code of ours: a second process with a cache of its own finds every graph."""
    code = """
import sys, torch
from torch._dynamo.utils import counters
from tests import quick_inductor, small_model
from tests.models import MASK
import dllm_compile
quick_inductor.begin()
if sys.argv[1] == "load":
    torch.compiler.load_cache_artifacts(open(sys.argv[2], "rb").read())
model = small_model.build(layers=1)
call = torch.compile(model, backend="dllm", options={"cache": "dual", "mask_id": MASK})
with torch.no_grad(), dllm_compile.loop():
    call(torch.tensor([[1, 2, MASK, MASK]]))
if sys.argv[1] == "save":
    open(sys.argv[2], "wb").write(torch.compiler.save_cache_artifacts()[0])
print(*[counters["inductor"][f"fxgraph_cache_{how}"] for how in ("miss", "hit", "bypass")])
"""
    told = []
    for what in ("save", "load"):
        given = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / what), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", code, what, str(tmp_path / "artifacts")]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=given)
        assert done.returncode == 0, done.stderr[-3000:]
        told.append([int(word) for word in done.stdout.splitlines()[-1].split()])
    (missed, hit, bypassed), (missed_then, hit_then, bypassed_then) = told
    assert missed >= hit_then >= 3
    assert (hit, bypassed, missed_then, bypassed_then) == (0, 0, 0, 0)


def test_memory_is_bounded_over_a_hundred_sequences() -> None:
    """Of random lengths and batches, some left half done: code, analyses and rows do not grow with their number."""
    model, held = small_model.build(), []
    draw = random.Random(0)
    bound = 2**18  # the largest batch takes 156,672 bytes, and sixteen may be alive
    for i in range(100):
        prompt, response, batch = draw.randint(2, 40), draw.choice([4, 8]), draw.choice([1, 2, 3])
        ids = models.start(prompt, i, batch).clamp(max=MASK - 1)
        dllm_compile.generate(model, ids, gen_length=response, steps=response, max_state_bytes=bound, **SETTINGS)
        stats = dllm_compile.stats(model)
        code = [len(known) for each in unit_code._SHARED.values() for known in each.variants.values()]
        live = [each for each in session.sessions() if each.shares({id(p) for p in model.parameters()})]
        held.append((sum(code), sum(len(each.batches) for each in live)))
        assert stats["state_bytes"] <= bound
    assert held[-1][0] == held[20][0]
    assert max(batches for _, batches in held) <= session.BATCHES
    programs = [len(b.programs.known) for b in gc.get_objects() if type(b) is Backend]
    assert max(programs) <= MOST


def test_what_it_cannot_do_is_said() -> None:
    model = models.build("llama", num_hidden_layers=1)
    for given, sentence in (
        ({"prompt_length": 0}, "prompt_length is 0; give a whole number of at least 1"),
        ({"prompt_length": 4, "batch": True}, "batch is True; give a whole number of at least 1"),
        ({"prompt_length": 4, "gen_length": 2.0}, "gen_length is 2.0; give a whole number of at least 1"),
        ({"prompt_length": 4, "method": "duel"}, "method is 'duel'; did you mean"),
    ):
        with pytest.raises(ValueError) as caught:
            dllm_compile.warm(model, **{"mask_id": MASK, **given})
        assert sentence in str(caught.value)
    with pytest.raises(ValueError, match="does not say how many tokens it embeds"):
        dllm_compile.warm(torch.nn.Linear(3, 3), 4, mask_id=0)
    with pytest.raises(TypeError, match="give the module that generate will be given"):
        dllm_compile.warm(len, 4, mask_id=0)  # type: ignore[arg-type]
