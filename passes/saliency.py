"""DyLLM's saliency as row sets (arXiv 2603.08026, and its authors' code where the two differ).

A row whose attention context barely drifted since the step before is not computed again by the MLP, nor are its key and
value in the next layer. In the first layer the salient rows are those whose token changed; each layer chooses those of
the next:

    role                         rows
    query, context, branch       active; exact for the salient ones, from the change of their values for the others
    key, value                   salient in the layer before
    MLP branch                   salient in this layer

Rows that are computed for samplers alone are salient throughout, as nothing is kept of them that is current, and enter
no state. A layer is cut behind its attention, since that decides how many rows the MLP computes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, wraps
from typing import Any

import torch

from dllm_compile.compat import group_size
from dllm_compile.core.assignment import ACTIVE, CONTEXTS, KEYED, SALIENT, Assignment, Operation
from dllm_compile.core.ranks import joined
from dllm_compile.interface.mechanism import Contexts, Mechanism, Option, asked, count, flag, is_number
from dllm_compile.kernels.delta_attention import delta_attention
from dllm_compile.kernels.salient_rows import salient_rows
from dllm_compile.kernels.sparse_attention import sparse_attention


def with_contexts(assignment: Assignment) -> Assignment:
    """A step whose contexts and MLP rows are kept for later ones."""
    return replace(assignment, keep=CONTEXTS) if assignment.keep else assignment


def salient(partial: Assignment, choose: Operation) -> Assignment:
    """A step that recomputes the salient ones of its active rows, which ``choose`` finds; see :func:`choosing`."""
    rows = replace(partial, name="salient", key=SALIENT, value=SALIENT, mlp=SALIENT)
    return replace(rows, attend=delta_attention, choose_salient=choose)


@cache
def choosing(mechanism: Mechanism) -> Operation:
    """The operation of ``Assignment.choose_salient`` that asks a mechanism: the same one for the same mechanism."""
    what, function = f"the mechanism {mechanism.name!r} says salient rows", mechanism.salient
    assert function is not None
    if function is turned:
        return turned_rows

    @wraps(function)
    def choose(
        new: torch.Tensor, old: torch.Tensor, cosine: torch.Tensor, bound: torch.Tensor, *places: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = places[3] if len(places) > 3 else None
        if group is not None:
            new, old = _of_all_ranks(new, group), _of_all_ranks(old, group)
        drifted = asked(what, function, Contexts(new, old, cosine, bound), cosine < 0)
        return salient_rows(drifted, bound, *places[:3])

    return choose


def _of_all_ranks(contexts: torch.Tensor, group: str) -> torch.Tensor:
    """Contexts ``[B, H, Q, h]`` of all heads, where each rank has some."""
    return joined(contexts.movedim(1, -1), group_size(group), group).movedim(-1, 1)


def turned(contexts: Contexts) -> torch.Tensor:
    """Rows whose cosine is below the bound; a NaN is not."""
    return contexts.cosine < contexts.bound


def turned_rows(
    new: torch.Tensor, old: torch.Tensor, cosine: torch.Tensor, bound: torch.Tensor, *places: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`choosing` for :func:`turned`. It has a name of its own: PyTorch finds code on disk by the names of what a
    graph calls.
    """
    return salient_rows(turned(Contexts(new, old, cosine, bound)), bound, *places[:3])


def thorough(assignment: Assignment) -> Assignment:
    """The same step with every active row salient, whatever its context does."""
    attend = sparse_attention if assignment.keys == KEYED else None
    rows = replace(assignment, name="block", key=ACTIVE, value=ACTIVE, mlp=None)
    return replace(rows, attend=attend, choose_salient=None)


def _on(options: Any) -> bool:
    return options.saliency is not None


def _alone(options: Any) -> bool:
    return _on(options) and options.cache == "none" and options.keep_ratio is None


MECHANISM = Mechanism(
    "saliency",
    "DyLLM, arXiv 2603.08026",
    options=(
        Option(
            "saliency_threshold",
            None,
            fits=lambda v: is_number(v) and -1 <= v <= 1,
            wanted="a cosine, such as 0.99, from -1 to 1",
            meaning="cosine of a context with its former self below which a row is computed again (tau), -1 to 1. No "
            "value is neutral: only ``full_steps`` of all steps are",
        ),
        Option(
            "full_steps",
            4,
            **count("4"),
            meaning="full steps that a sequence begins with where saliency is on, at least 1",
            synonyms=("num_full_steps",),
            read=_on,
            beside="saliency_threshold",
        ),
        Option(
            "response_only",
            True,
            **flag(),
            meaning="whether steps with saliency and no cache leave the prompt alone, but for some; else none does",
            read=_alone,
            beside="saliency_threshold without cache and keep_ratio",
        ),
        Option(
            "whole_interval",
            4,
            **count("4"),
            meaning="those some are the first four steps and every so many, from 1 counted. DyLLM's CUDA code has 4, "
            "its port to TPUs 8",
            read=_alone,
            beside="saliency_threshold without cache and keep_ratio",
        ),
    ),
    switches=("saliency_threshold",),
    salient=turned,
    neutral={"saliency_threshold": 0.99, "full_steps": 10**6},
    methods={"dyllm": {"saliency_threshold": 0.99}},
    presets={
        "dyllm/llada-safe": {"method": "dyllm", "saliency_threshold": 0.995},
        "dyllm/dream": {"method": "dyllm", "saliency_threshold": 0.995},
        "dyllm/dream-safe": {"method": "dyllm", "saliency_threshold": 0.9975},
        "dyllm/tpu": {"method": "dyllm", "whole_interval": 8},
    },
)
"""The thresholds are of the paper; ``dyllm/tpu`` is as its authors' port to TPUs."""
