"""What the backend did: counts of steps by variant, and the drift that ``verify`` measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields
from typing import Any

from dllm_compile.core.assignment import Assignment


@dataclass
class Tally:
    """What one call of a graph ran.

    Attributes:
        layers: ``"seen"``, those that ran, and ``"cached"``, those of them that read rows kept of an earlier step.
        own: whether a layer ran the variant of the step, and not the one that computes every row in its place.
        flops: of matrix products, convolutions and attention, rows that pad an index included.
    """

    layers: Counter[str] = field(default_factory=Counter)
    own: bool = False
    flops: float = 0.0

    def layer(self, assignment: Assignment, wanted: Assignment) -> None:
        """Note that a layer, or the first half of one that is cut behind its attention, ran."""
        self.layers["seen"] += 1
        self.layers["cached"] += assignment.reads_kept
        self.own |= assignment.reads_kept or assignment.name == wanted.name


@dataclass
class Stats:
    """Counters of one session.

    Attributes:
        sequences: generations seen.
        steps: forward calls by the name of the variant that ran; ``"repeat"`` served the previous logits. A step in
            which no layer had rows kept ran every row, and is called ``"full"``.
        rows: residual-stream rows of those calls, a sequence, in total; logits rows likewise in ``logits``.
        refreshes: steps in which sequences refreshed (all their rows that are present, or those of the response), by
            the first reason of each: ``"block"``, a block or a sequence begins, also anew where weights or inputs
            changed; ``"edit"``, a token changed that no partial step computes; ``"present"``, a row came back that no
            step since the last refresh computed; ``"rule"``, the rule's own ``refresh``; ``"interval"``, ``"prompt"``
            or ``"response"``, the interval is over; ``"steps"``, a further one of several full steps (``delay``,
            ``full_steps``), or along with another sequence; ``"after_layer"``, decided in mid-step.
        layers: ``"seen"``, layers that ran in all of them, and ``"cached"``, those that read rows kept of other steps.
        graphs: calls of graphs that those steps were made of.
        seconds_inside, seconds_outside: between the first and the last call of sequences: in their calls, and between
            one and the next; of several under way in turns, each moment once. Neither has a call in which code was
            compiled. By the host's clock: where a device computes beside the host, a call counts until it returns, and
            who waits for the device next, for the rest.
        flops_whole, flops: of those calls, had they computed every row (where they are of several drafts, of one), and
            as they ran; see :class:`Tally`. Graphs that run on plain Inductor, what precedes the first layer and what a
            sampler computes are in neither.
        salient: rows that layers of saliency steps found salient, the most of a batch, in total.
        salient_layers: how many layers that were.
        cuda_graphs: calls of graphs in partial steps, where they may be recorded, by how they were launched:
            ``"replayed"``, or kernel by kernel, and why. The first of a kind is never recorded.
        overflows: saliency steps that ran again with every row, as a layer had more salient ones than its capacity.
        checked: steps that ``verify`` compared.
        max_logit_error: largest absolute difference of a readable logit, over all checks.
        token_flips: masked positions whose best token differed, over all checks.
        first_divergence: step of the first flip, by row of the batch.
    """

    sequences: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    logits: Counter[str] = field(default_factory=Counter)
    refreshes: Counter[str] = field(default_factory=Counter)
    layers: Counter[str] = field(default_factory=Counter)
    graphs: int = 0
    seconds_inside: float = 0.0
    seconds_outside: float = 0.0
    flops_whole: float = 0.0
    flops: float = 0.0
    salient: int = 0
    salient_layers: int = 0
    cuda_graphs: Counter[str] = field(default_factory=Counter)
    overflows: int = 0
    checked: int = 0
    max_logit_error: float = 0.0
    token_flips: int = 0
    first_divergence: dict[int, int] = field(default_factory=dict)

    def count(self, step: Any) -> None:
        """Note a step whose first graph has run: as a full one, until a layer runs the variant that was planned."""
        planned = "repeat" if step.repeat else step.assignment.name
        chosen = step.assignment
        reads = chosen.reads_kept or chosen.alone or chosen.evict is not None
        self.refreshes.update(() if step.repeat else step.refresh)
        step.counted = "full" if planned != "repeat" and reads and not step.own else planned
        self._add(step.counted, step, 1)

    def ran(self, step: Any, tally: Tally, whole: float) -> None:
        """Note a call of a graph that was a part of a step.

        Args:
            step: that it was a part of.
            tally: what it ran.
            whole: FLOPs of a call of every row.
        """
        step.own |= tally.own
        if tally.own and step.counted == "full" != step.assignment.name:
            self._add("full", step, -1)
            step.counted = step.assignment.name
            self._add(step.counted, step, 1)
        self.layers.update(tally.layers)
        self.graphs += 1
        self.flops_whole += whole
        self.flops += tally.flops

    def _add(self, name: str, step: Any, times: int) -> None:
        tokens = step.shape[1]
        added = {"steps": 1, "rows": tokens if name == "full" else step.sizes.get("active", tokens)}
        for counter, number in {**added, "logits": step.sizes["readable"]}.items():
            counts: Counter[str] = getattr(self, counter)
            counts[name] += times * number
            if times < 0 and not counts[name]:
                del counts[name]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for printing; with ``graphs_per_step``, and the shares ``flops_skipped`` and ``time_outside``."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain = {name: dict(value) if isinstance(value, Counter) else value for name, value in plain.items()}
        plain["layers"] = {name: self.layers[name] for name in ("cached", "seen")}
        plain["graphs_per_step"] = self.graphs / max(sum(self.steps.values()), 1)
        plain["flops_skipped"] = 1 - self.flops / self.flops_whole if self.flops_whole else 0.0
        spent = self.seconds_inside + self.seconds_outside
        plain["time_outside"] = self.seconds_outside / spent if spent else 0.0
        return plain

    def add(self, other: Stats) -> None:
        """Fold another session's counters in."""
        for name in ("steps", "rows", "logits", "refreshes", "layers", "cuda_graphs"):
            getattr(self, name).update(getattr(other, name))
        for name in ("sequences", "graphs", "seconds_inside", "seconds_outside", "flops_whole", "flops", "salient"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("salient_layers", "overflows", "checked", "token_flips"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.max_logit_error = max(self.max_logit_error, other.max_logit_error)
        for row, step in other.first_divergence.items():
            self.first_divergence[row] = min(step, self.first_divergence.get(row, step))
