"""Runs a case of the standing search and says where the backend is not eager."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import torch

import dllm_compile

from . import fuzz_models
from .fuzz_cases import Case, Op
from .models import MASK, VOCABULARY

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25}
SINGLE = 1e-5
"""In place of 1e-9 for transformers' models through Inductor: their norms are float32 in any dtype, and Inductor alone
differs from eager by up to 4e-6 in logits of up to 6."""
"""Of the largest logit: a row of another step, or of other weights, differs by about half of it."""
WRITTEN = 12288.0
"""Written into returned logits; a number of every dtype."""
PATIENCE = 120.0
KNOWN = {each.name for each in fields(dllm_compile.Options)}


class Wrong(Exception):
    """The backend and eager differ.

    Attributes:
        what: the kind of difference.
        at: number of the operation.
        detail: more for a person to read.
    """

    def __init__(self, what: str, detail: str = "", at: int = -1) -> None:
        super().__init__(f"{what}: {detail}")
        self.what, self.detail, self.at = what, detail, at


class OutOfTime(Exception):
    """The search is over in the middle of a case."""


class Slot:
    """One sequence batch of a sampling loop.

    Attributes:
        ids: ``[B, S]`` int64.
        prompt: tokens before the response; ``response`` behind them.
        mask: ``[B, S]`` int64, 0 at padding, or ``None``.
        cond: the model's conditioning, or ``None``.
        logits: of the last call, by eager; in lossy cases the backend's own.
        fresh: whether the next call begins something, so that it is eager's whatever the settings.
        guided: whether the batch is doubled by a copy without a prompt.
        history: ids after each fill.
    """

    def __init__(self, ids: torch.Tensor, prompt: int, response: int) -> None:
        self.ids, self.prompt, self.response = ids, prompt, response
        self.mask: torch.Tensor | None = None
        self.cond: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        self.fresh, self.guided = True, False
        self.history: list[torch.Tensor] = []
        self.loop: Any = None
        self.held: list[tuple[str, Any, torch.Tensor]] = []

    def x(self) -> torch.Tensor:
        """What the model is given."""
        if not self.guided:
            return self.ids.clone()
        blank = self.ids.clone()
        blank[:, : self.prompt] = MASK
        return torch.cat([self.ids, blank])


def parts(out: Any) -> list[torch.Tensor]:
    """Logits, and what a second head gives."""
    if isinstance(out, torch.Tensor):
        return [out]
    return list(out) if isinstance(out, tuple) else [out.logits]


def draws(seed: int) -> torch.Generator:
    """Random numbers of one operation."""
    return torch.Generator().manual_seed(seed)


class Run:
    """A model, compiled and not, and the sequences that it is asked about.

    Args:
        case: what to run.
        stop: time in ``time.monotonic`` at which to give up, if any.
    """

    def __init__(self, case: Case, stop: float | None = None) -> None:
        torch._dynamo.reset()
        self.case, self.stop, self.calls = case, stop, 0
        self.dtype = DTYPES[case.get("dtype", "float64")]
        self.plain = case["model"].get("name", "plain") == "plain"
        self.tolerance = TOLERANCE[self.dtype]
        if case["model"].get("name", "plain") != "plain" and case.get("lowering") == "inductor":
            self.tolerance = max(self.tolerance, SINGLE)
        self.model = fuzz_models.build(case["model"], self.dtype)
        self.options = {name: value for name, value in case["options"].items() if name in KNOWN or name == "preset"}
        if self.options.get("mask_id") == "MASK":
            self.options["mask_id"] = MASK
        self.options["lowering"] = case.get("lowering", "eager")
        self.call = self._compiled(self.model)
        self.functional: Any = None
        self.lossy = case.get("kind", "neutral") != "neutral"
        self.slots: dict[int, Slot] = {}

    def _compiled(self, function: Any) -> Any:
        how = {"backend": "dllm", "options": dict(self.options), "dynamic": self.case.get("dynamic")}
        return torch.compile(function, **how)

    def run(self) -> None:
        """All operations.

        Raises:
            Wrong: the backend is not eager.
            OutOfTime: it is time to stop.
        """
        for at, op in enumerate(self.case["ops"]):
            try:
                with torch.inference_mode() if self.case.get("inference") else torch.no_grad():
                    self.do(op)
            except Wrong as wrong:
                wrong.at = at
                raise

    def do(self, op: Op) -> None:
        """One operation; on a sequence that was never started it does nothing."""
        if self.stop is not None and time.monotonic() > self.stop:
            raise OutOfTime
        name, rest = op[0], op[1:]
        if name in ("start", "weights", "threads"):
            getattr(self, f"_{name}")(*rest)
        elif rest[0] in self.slots:
            getattr(self, f"_{name}")(self.slots[rest[0]], *rest[1:])

    # -- calls --------------------------------------------------------------------------------------------------------

    def _inputs(self, slot: Slot) -> dict[str, torch.Tensor]:
        inputs = {}
        double = 2 if slot.guided else 1
        if slot.mask is not None:
            inputs["mask" if self.plain else "attention_mask"] = torch.cat([slot.mask] * double)
        if slot.cond is not None:
            inputs["cond"] = torch.cat([slot.cond] * double) if slot.cond.dim() else slot.cond
        return inputs

    def _asked(self, function: Callable[..., Any], *args: Any, **inputs: Any) -> list[torch.Tensor]:
        """What the backend answers; a crash is a difference, since eager has none."""
        self.calls += 1
        try:
            return parts(function(*args, **inputs))
        except (KeyboardInterrupt, OutOfTime):
            raise
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            inner = error.__cause__ or error
            raise Wrong(f"crash {type(inner).__name__}", lines[0][:300]) from error

    def _context(self, slot: Slot, word: str) -> Any:
        if word == "exact" and hasattr(dllm_compile, "exact_calls"):
            return dllm_compile.exact_calls()
        if word == "loop" and hasattr(dllm_compile, "loop"):
            slot.loop = slot.loop or dllm_compile.loop()
            return slot.loop
        return contextlib.nullcontext()

    def _call(self, slot: Slot, hold: str = "", word: str = "") -> None:
        x, inputs = slot.x(), self._inputs(slot)
        given = x.clone()
        with self._context(slot, word):
            got = self._asked(self.call, x, **inputs)
        if not torch.equal(x, given):
            raise Wrong("the ids were written into")
        want = parts(self.model(x, **inputs))
        every = word == "exact" and hasattr(dllm_compile, "exact_calls")
        if not self.lossy or slot.fresh or every:
            self._compare(got, want, x, every, inputs)
        slot.fresh = False
        slot.logits = (got if self.lossy else want)[0].clone()
        self._holding(slot, hold, got[0])

    def _compare(
        self, got: list[torch.Tensor], want: list[torch.Tensor], x: torch.Tensor, every: bool, inputs: dict[str, Any]
    ) -> None:
        if len(got) != len(want):
            raise Wrong("outputs", f"{len(got)} of {len(want)}")
        masked = x == MASK
        readable = masked.clone()
        if self.options.get("shift") is not False:
            readable[:, :-1] |= masked[:, 1:]
        idle = not masked.any()
        if every or idle or self.options.get("readable") == "all":
            readable = torch.ones_like(masked)
        hidden = inputs.get("mask", inputs.get("attention_mask"))
        for number, (a, b) in enumerate(zip(got, want, strict=True)):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise Wrong("shape or dtype", f"{tuple(a.shape)} {a.dtype}, not {tuple(b.shape)} {b.dtype}")
            if (a == WRITTEN).any():
                raise Wrong("what a caller wrote came back")
            rows = readable if number == 0 else torch.ones_like(masked)
            if hidden is not None:
                rows = rows & hidden.bool()  # nobody reads padding
            if rows.any():
                a, b = a.double(), b.double()
                worst = (a - b)[rows & ~b.isnan().any(-1)].abs().nan_to_num(torch.inf)
                if worst.numel() and worst.max() > self.tolerance * max(1.0, b.nan_to_num().abs().max().item()):
                    which = "unmasked ids" if idle else "readable rows" if number == 0 else "second output"
                    raise Wrong(f"wrong {which}", f"by {worst.max():.3g}")

    def _beside(self, slot: Slot, which: str) -> None:
        """The other call of guidance: the same ids without the prompt, or with no conditioning."""
        other = Slot(slot.ids.clone(), slot.prompt, slot.response)
        other.mask, other.cond = slot.mask, slot.cond
        if which == "blank":
            other.ids[:, : slot.prompt] = MASK
        elif slot.cond is not None:
            other.cond = torch.zeros_like(slot.cond)
        other.fresh = False
        self._call(other)

    def _holding(self, slot: Slot, hold: str, logits: torch.Tensor) -> None:
        """Write into returned logits, or hold a part of their memory; what was held before is as it was."""
        for kind, holder, copy in slot.held:
            now = holder
            if kind == "storage":
                now = torch.empty(0, dtype=copy.dtype).set_(holder, 0, copy.shape)
            if not torch.equal(now.nan_to_num(WRITTEN), copy.nan_to_num(WRITTEN)):
                raise Wrong(f"held {kind} was written into")
        if hold == "write":
            logits.fill_(WRITTEN)
        elif hold == "data":
            logits.data.fill_(WRITTEN)
        elif hold == "numpy" and logits.dtype != torch.bfloat16:
            logits.numpy()[...] = WRITTEN
        elif hold == "hold":
            slot.held.append((hold, logits, logits.clone()))
        elif hold == "storage" and logits.is_contiguous() and not logits.storage_offset():
            slot.held.append((hold, logits.untyped_storage(), logits.clone()))
        elif hold == "view":
            slot.held.append((hold, logits[..., ::2].detach(), logits[..., ::2].clone()))
        slot.held = slot.held[-3:]

    # -- sequences ----------------------------------------------------------------------------------------------------

    def _start(
        self, number: int, seed: int, batch: int, prompt: int, response: int, padding: str = "none", kind: str = "plain"
    ) -> None:
        generator = draws(seed)
        ids = torch.randint(3, MASK, (batch, prompt + response), generator=generator)
        ids[:, prompt:] = MASK
        slot = Slot(ids, prompt, response)
        if number in self.slots:
            slot.history, slot.held = self.slots[number].history, self.slots[number].held
        if kind == "infill" and response > 2:
            ids[:, -(response // 3) :] = 5
        elif kind == "blank":
            ids[:, :prompt] = MASK
        slot.guided = kind == "guided"
        cut = torch.randint(0, prompt, (batch,), generator=generator).tolist()
        if padding == "ragged":
            for row, less in enumerate(cut):
                ids[row, prompt - less : prompt] = MASK
        elif padding in ("left", "right") and any(cut):
            slot.mask = torch.ones_like(ids)
            for row, hidden in enumerate(cut):
                where = slice(0, hidden) if padding == "left" else slice(ids.shape[1] - min(hidden, response - 1), None)
                ids[row, where], slot.mask[row, where] = 0, 0
        how = self.case["model"].get("cond")
        if self.plain and how:
            width = self.case["model"].get("heads", 2) * self.case["model"].get("head_dim", 4)
            shape = (batch, width) if how != "scalar" else ()
            slot.cond = torch.randn(shape, generator=draws(seed + 7 * number), dtype=torch.float64).to(self.dtype) * 2
        self.slots[number] = slot

    def _fill(self, slot: Slot, seed: int, count: int, source: str, block: int = 0) -> None:
        generator = draws(seed)
        batch = slot.ids.shape[0]
        logits = slot.logits
        if logits is None or logits.shape[1] != slot.ids.shape[1] or logits.shape[0] < batch:
            logits = torch.randn(*slot.ids.shape, VOCABULARY, generator=generator)
        logits = logits[:batch].double().nan_to_num().clone()
        logits[..., MASK] = -torch.inf
        if source == "random":
            logits[..., :MASK] = torch.randn(logits[..., :MASK].shape, generator=generator, dtype=torch.float64)
        elif source == "draw":
            noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            logits = logits - torch.log(-torch.log(noise))
        sure, best = logits.softmax(-1).max(-1)
        for row in range(batch):
            at = (slot.ids[row] == MASK).nonzero()[:, 0]
            if block and at.numel():
                at = at[at < int(at[0]) + block]
            chosen = at[sure[row, at].argsort(descending=True)[:count]]
            slot.ids[row, chosen] = best[row, chosen]
        slot.history.append(slot.ids.clone())

    def _places(self, slot: Slot, seed: int, count: int, where: torch.Tensor) -> Iterator[tuple[int, int]]:
        """Some of the places that are set in ``where``, in a random sequence of the batch."""
        generator = draws(seed)
        row = int(torch.randint(slot.ids.shape[0], (), generator=generator))
        at = where[row].nonzero()[:, 0]
        for i in at[torch.randperm(at.numel(), generator=generator)[:count]].tolist():
            yield row, i

    def _answer(self, slot: Slot) -> torch.Tensor:
        where = torch.zeros_like(slot.ids, dtype=torch.bool)
        where[:, slot.prompt :] = True
        return where & (slot.ids != MASK)

    def _remask(self, slot: Slot, seed: int, count: int) -> None:
        for place in self._places(slot, seed, count, self._answer(slot)):
            slot.ids[place] = MASK

    def _edit(self, slot: Slot, seed: int, count: int, which: str) -> None:
        where = self._answer(slot)
        if which == "prompt":
            where = torch.zeros_like(where)
            where[:, : slot.prompt] = True
            where &= slot.ids != MASK
        for place in self._places(slot, seed, count, where):
            slot.ids[place] = 3 + (int(slot.ids[place]) + seed) % (MASK - 4)

    def _swap(self, slot: Slot, seed: int) -> None:
        """Another prompt, behind which all is masked, in the place of one sequence of the batch."""
        generator = draws(seed)
        row = int(torch.randint(slot.ids.shape[0], (), generator=generator))
        slot.ids[row, : slot.prompt] = torch.randint(3, MASK, (slot.prompt,), generator=generator)
        slot.ids[row, slot.prompt :] = MASK

    def _cond(self, slot: Slot, seed: int, how: str = "new") -> None:
        if slot.cond is None:
            return
        new = torch.randn(slot.cond.shape, generator=draws(seed), dtype=torch.float64).to(self.dtype) * 2
        slot.fresh = True
        if how == "new":
            slot.cond = new
        else:
            slot.cond.copy_(new)

    def _hide(self, slot: Slot, seed: int) -> None:
        """One more token of the prompt is hidden, in place where a mask is there."""
        slot.fresh = True
        if slot.mask is None:
            slot.mask = torch.ones_like(slot.ids)
        row = int(torch.randint(slot.ids.shape[0], (), generator=draws(seed)))
        slot.mask[row, : min(1 + seed % 3, slot.ids.shape[1] - 2)] = 0

    def _score(self, slot: Slot, seed: int, kind: str = "masked", word: str = "") -> None:
        """One Monte Carlo sample of a likelihood, or teacher forcing, of one answer to the prompt of a sequence.

        The answer is what the model thinks of last, since a sample of its own answer is a step of a loop to whoever
        sees ids alone.
        """
        x, inputs = slot.ids.clone(), self._inputs(slot)
        if slot.guided:
            return
        x[:, : slot.prompt][x[:, : slot.prompt] == MASK] = 4
        x[:, slot.prompt :] = MASK
        answer = parts(self.model(x, **inputs))[0][:, slot.prompt :, 3:MASK].nan_to_num().argmin(-1) + 3
        generator = draws(seed)
        if kind == "masked":
            share = torch.rand(x.shape[0], 1, generator=generator)
            hide = torch.rand(answer.shape, generator=generator) < share
            hide[:, int(torch.randint(answer.shape[1], (), generator=generator))] = True
            answer = answer.masked_fill(hide, MASK)
        x[:, slot.prompt :] = answer
        with self._context(slot, word):
            got = self._asked(self.call, x, **inputs)
        every = word == "exact" and hasattr(dllm_compile, "exact_calls")
        if not self.lossy or every or not word:
            self._compare(got, parts(self.model(x, **inputs)), x, every, inputs)

    # -- the model ----------------------------------------------------------------------------------------------------

    def _weights(self, how: str, seed: int) -> None:
        generator = draws(seed)
        named = [(name, p) for name, p in self.model.named_parameters() if p.dim() > 1]
        name, old = named[int(torch.randint(len(named), (), generator=generator))]
        new = old.detach() + 0.3 * torch.randn(old.shape, generator=generator, dtype=torch.float64).to(old.dtype)
        if how == "data":
            old.data.add_(new - old.detach())
        elif how == "data=":
            old.data = new
        elif how == "copy":
            old.copy_(new)
        elif how == "inplace":
            old.add_(new - old.detach())
        elif how == "numpy" and old.dtype != torch.bfloat16:
            old.detach().numpy()[...] = new.numpy()
        elif how == "vector":
            vector = torch.nn.utils.parameters_to_vector(self.model.parameters())
            torch.nn.utils.vector_to_parameters(vector * 1.1, self.model.parameters())
        elif how == "buffer":
            for key, buffer in self.model.named_buffers():
                if buffer.is_floating_point() and ("rates" in key or "inv_freq" in key):
                    buffer.data.mul_(1.3)
        elif how == "replace":
            owner, _, last = name.rpartition(".")
            setattr(self.model.get_submodule(owner), last, torch.nn.Parameter(new))
        for slot in self.slots.values():
            slot.fresh = True

    def _functional(self, slot: Slot, seed: int) -> None:
        """Two sets of weights that are plain tensors and new, the second with one more token: each begins anew."""
        if self.functional is None:
            model = self.model

            def call(weights: dict[str, torch.Tensor], x: torch.Tensor, inputs: dict[str, Any]) -> Any:
                return torch.func.functional_call(model, weights, (x,), inputs)

            self.functional = call, self._compiled(call)
        eager, compiled = self.functional
        inputs = self._inputs(slot)
        for number in range(2):
            weights = {name: p.detach() * (1 + 0.2 * number) for name, p in self.model.named_parameters()}
            x = slot.x()
            if number:
                masked = (x[0] == MASK).nonzero()[:-1, 0]
                x[0, masked[:1]] = 3 + seed % (MASK - 4)
            got = self._asked(compiled, weights, x, inputs)
            self._compare(got, parts(eager(weights, x, inputs)), x, False, inputs)

    def _interrupt(self, slot: Slot, seed: int) -> None:
        """Ctrl-C where the backend enters its ``seed``-th function, then the same call again."""
        x, inputs = slot.x(), self._inputs(slot)
        left = seed

        def strike(frame: Any, event: str, _: Any) -> None:
            nonlocal left
            if event == "call" and "dllm_compile" in frame.f_code.co_filename:
                left -= 1
                if left == 0:
                    sys.setprofile(None)
                    raise KeyboardInterrupt

        sys.setprofile(strike)
        try:
            self.call(x, **inputs)
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
        self._call(slot)

    def _grad(self, slot: Slot, seed: int) -> None:
        """The loss of one call and its gradients."""
        x, inputs = slot.x(), self._inputs(slot)
        found = []
        with torch.enable_grad():
            for function in (self.call, self.model):
                self.model.zero_grad(set_to_none=True)
                compiled = function is self.call
                out = self._asked(function, x, **inputs) if compiled else parts(function(x, **inputs))
                loss = out[0].double().square().mean() + 0.1 * next(self.model.parameters()).double().square().sum()
                try:
                    loss.backward()
                except RuntimeError as error:
                    if not compiled:
                        raise
                    raise Wrong("backward fails", str(error).splitlines()[0][:200]) from error
                found.append({n: None if p.grad is None else p.grad for n, p in self.model.named_parameters()})
        self.model.zero_grad(set_to_none=True)
        for name, want in found[1].items():
            got = found[0][name]
            if (got is None) != (want is None):
                raise Wrong("gradients are lost", name)
            if got is not None and want is not None:
                most = 10 * self.tolerance * max(1.0, want.abs().max().item())
                if (got - want).abs().max().item() > most:
                    raise Wrong("wrong gradients", name)

    def _dropout(self, slot: Slot, seed: int) -> None:
        """Two calls in ``train()`` differ where the model drops something."""
        if not self.case["model"].get("dropout") or not self.plain:
            return
        x, inputs = slot.x(), self._inputs(slot)
        torch.manual_seed(seed)
        self.model.train()
        try:
            first, second = (self._asked(self.call, x, **inputs)[0].clone() for _ in range(2))
        finally:
            self.model.eval()
        if torch.equal(first, second):
            raise Wrong("dropout repeats")

    def _threads(self, *lists: list[Op]) -> None:
        """Each list in a thread of its own."""
        wrong: list[BaseException] = []

        def work(ops: list[Op]) -> None:
            try:
                for op in ops:
                    with torch.inference_mode() if self.case.get("inference") else torch.no_grad():
                        self.do(op)
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=work, args=(ops,), daemon=True) for ops in lists]
        often = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
                if thread.is_alive():
                    raise Wrong("a thread hangs")
        finally:
            sys.setswitchinterval(often)
        for error in sorted(wrong, key=lambda each: not isinstance(each, Wrong)):
            raise error


def flat(ops: list[Op]) -> list[Op]:
    """Operations of all threads, one thread after the other."""
    out: list[Op] = []
    for op in ops:
        out += flat([each for part in op[1:] for each in part]) if op[0] == "threads" else [op]
    return out


def attempt(case: Case, stop: float | None = None) -> tuple[Wrong | None, int]:
    """Run a case.

    Returns:
        What is wrong, if anything, and the number of calls.
    """
    run = Run(case, stop)
    calls = 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run.run()
            calls = run.calls
            if case.get("kind") == "streams":
                calls += _alone(case, run, stop)
    except Wrong as wrong:
        return wrong, run.calls
    except OutOfTime:
        pass
    return None, max(calls, run.calls)


def _alone(case: Case, together: Run, stop: float | None) -> int:
    """Each stream by itself gives the tokens that it gave beside the other."""
    calls = 0
    for number, slot in together.slots.items():
        only = Run({**case, "ops": [op for op in flat(case["ops"]) if op[1] == number]}, stop)
        only.run()
        calls += only.calls
        alone = only.slots[number].history
        for at, (a, b) in enumerate(zip(slot.history, alone, strict=True)):
            if not torch.equal(a, b):
                raise Wrong("a stream is not as it is alone", f"slot {number}, after {at + 1} fills", len(case["ops"]))
    return calls
