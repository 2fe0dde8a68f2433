"""How sure a row of logits is of its token: all that a masked-diffusion sampler reads of a vocabulary.

With ``m = max_v x_v``, ``b`` the first ``v`` where ``x_v = m``, ``Z = sum_v exp(x_v - m)``, ``p_v = exp(x_v - m) / Z``:

    best        = b
    maximum     = m
    probability = p_chosen                               LLaDA's ``low_confidence``, Dream's ``maskgit_plus``
    entropy     = sum_v p_v log p_v                      Dream's ``entropy``
                = S / Z - log Z,  S = sum_v (x_v - m) exp(x_v - m)
    margin      = p_b - max_{v != b} p_v                 Dream's ``topk_margin``

Dream's own term is ``p log(p + 1e-10)``, which needs ``Z`` before its sum can begin: one more pass over the logits. The
plain entropy comes of a sum taken beside ``Z``, in one pass if both are rescaled as the maximum grows (online softmax,
arXiv 1805.02867). Dream's is larger by at most ``V * 1e-10``, as ``0 <= p log(1 + 1e-10 / p) <= 1e-10``: by 1.3e-5 for
LLaDA's 126,464 columns, where an even row has -11.7.

A column of -inf has probability 0. A row of nothing else, or with a +inf, has no softmax: all but ``best`` and
``maximum`` are NaN. A row with a NaN has ``best`` 0 and NaN elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dllm_compile.kernels.operation import on_cuda, operation

RUN = 64


class Confidence(NamedTuple):
    """Each ``[...]`` for logits ``[..., V]``; the floating ones are float64 for float64 logits, else float32."""

    best: torch.Tensor  # int64, the first column of the largest logit
    maximum: torch.Tensor
    probability: torch.Tensor
    entropy: torch.Tensor  # negative: 0 is most certain
    margin: torch.Tensor


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def confidence(logits: torch.Tensor, chosen: torch.Tensor | None = None) -> Confidence:
    """Best token of each row, and the measures of how sure it is. Has no gradient.

    Args:
        logits: ``[..., V]`` float64, float32, bfloat16 or float16, of any strides, ``V`` at least 1.
        chosen: ``[...]`` int64 columns whose probability is asked for; by default the best.

    Returns:
        Five tensors ``[...]``; see ``Confidence``.
    """
    if logits.dim() < 1 or not logits.dtype.is_floating_point or logits.shape[-1] < 1:
        raise ValueError(f"logits are floating [..., V], V at least 1; got {logits.dtype} {[*logits.shape]}")
    if chosen is not None and (chosen.dtype != torch.int64 or chosen.shape != logits.shape[:-1]):
        raise ValueError(f"chosen is int64 {[*logits.shape[:-1]]}; got {chosen.dtype} {[*chosen.shape]}")
    return Confidence(*torch.ops.dllm.confidence(logits, chosen))


def reference(logits: torch.Tensor, chosen: torch.Tensor | None) -> Parts:
    """The op. What has ``V`` columns ends in sums and extrema that read ``x``, so that Inductor keeps none of it.

    Arguments and results as for ``confidence``.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    maximum = x.amax(-1)
    under = x < maximum[..., None]
    ties = (~under).sum(-1, dtype=torch.int32)
    second = torch.where(ties > 1, maximum, torch.where(under, x, -torch.inf).amax(-1))

    shifted = (x - maximum[..., None]).clamp(min=-1000.0)  # exp is 0 there, and 0 * -inf is NaN
    weight = shifted.exp()
    # a sum of ``weight`` alone reads nothing of ``x``: Inductor may loop over it apart, and keep it for that loop
    total = ties * (maximum - maximum).exp() + torch.where(under, weight, 0.0).sum(-1)
    entropy = (weight * shifted).sum(-1) / total - total.log()
    picked = maximum if chosen is None else x.gather(-1, chosen[..., None]).squeeze(-1)
    best = _first(x, maximum, under)
    return best, maximum, (picked - maximum).exp() / total, entropy, (1 - (second - maximum).exp()) / total


def _first(x: torch.Tensor, maximum: torch.Tensor, under: torch.Tensor) -> torch.Tensor:
    """The first column that holds the maximum: first the block of ``RUN`` columns that contains it, found in the same
    loop as the sums, then the column within the block.

    A run is one number for a whole vector of Inductor's loop. Numbering each column makes the loop a quarter slower,
    ``torch.argmax`` more than that.
    """
    columns = x.shape[-1]
    column = torch.arange(columns, dtype=torch.int32, device=x.device)
    run = torch.where(under, columns, column // RUN).amin(-1)
    near = (run[..., None] * RUN + column[:RUN]).clamp(max=columns - 1).long()
    return torch.where(x.gather(-1, near) < maximum[..., None], columns, near).amin(-1)


@operation("confidence", reference)
def _confidence(logits: torch.Tensor, chosen: torch.Tensor | None) -> Parts:
    """``reference`` in Inductor's hands on a CPU, a Triton kernel on CUDA."""
    if not on_cuda(logits):
        return reference(logits, chosen)
    from dllm_compile.kernels.confidence_triton import launch

    return launch(logits, chosen)
