"""How likely a masked-diffusion model finds an answer: LLaDA's Monte Carlo estimate (arXiv 2502.09992)."""

from __future__ import annotations

import torch

from .declared import exact_calls
from .interface.mechanism import is_int
from .sampler.check import check_ids
from .sampler.family import Family, family, model_inputs
from .sampler.step import Model, read_logits


def answer_masks(length: int, samples: int, seed: int) -> torch.Tensor:
    """Which tokens of an answer each sample masks.

    The number of masks is uniform over 1 to ``length`` in every sample; over the samples it is spread evenly behind a
    random first one, as in LLaDA's own evaluation. Which tokens are masked is uniform given their number.

    Args:
        length: tokens of the answer, ``L``.
        samples: how many, ``N``.
        seed: of the random numbers; nothing else decides, so that answers of equal length get the same masks.

    Returns:
        ``[N, L]`` bool on the CPU.
    """
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(length, (), generator=draw)
    counts = (first + torch.arange(samples) * length // samples) % length + 1
    order = torch.rand(samples, length, generator=draw).argsort(1).argsort(1)
    return order < counts.unsqueeze(1)


@torch.no_grad()
def log_likelihood(
    model: Model,
    prompt: torch.Tensor,
    answer: torch.Tensor,
    *,
    samples: int = 128,
    batch_size: int = 1,
    seed: int = 0,
    mask_id: int | None = None,
    shift: bool | None = None,
) -> float:
    """Estimate a lower bound of the log-likelihood of an answer to a prompt.

    With ``l`` of ``L`` answer tokens masked, ``L / l`` times the sum of the log-probabilities of the masked tokens; the
    mean of that over samples. Samples with equal masks are computed once. The calls compute every row, whatever
    the model is compiled with (:func:`dllm_compile.exact_calls`).

    Args:
        model: maps ids ``[B, S]`` to logits ``[B, S, V]``, bare or as ``.logits``; compiled or not.
        prompt: ``[1, P]`` ids on the device of the model; ``P`` may be 0, but not where the model is shifted.
        answer: ``[1, L]`` ids, at least one.
        samples: of the masks; LLaDA's evaluation takes 128, and 1 where answers have one token.
        batch_size: samples in one call; changes nothing but rounding.
        seed: of :func:`answer_masks`.
        mask_id, shift: as in :func:`dllm_compile.generate`.

    Raises:
        TypeError: the ids are no tensors.
        ValueError: a shape or number out of range, or an unknown mask token.
    """
    kind = family(model, mask_id, shift)
    _check(prompt, answer, kind)
    for name, value in (("samples", samples), ("batch_size", batch_size)):
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
    masks, times = torch.unique(answer_masks(answer.shape[1], samples, seed), dim=0, return_counts=True)
    total = 0.0
    for some, often in zip(masks.split(batch_size), times.split(batch_size), strict=True):
        some = some.to(answer.device)
        logits = _answer_logits(model, prompt, answer.masked_fill(some, kind.mask_id), kind)
        found = _log_softmax(logits).gather(-1, answer.expand(len(some), -1).unsqueeze(-1)).squeeze(-1)
        sums = found.double().masked_fill(~some, 0).sum(1) * answer.shape[1] / some.sum(1)
        total += float((sums * often.to(sums)).sum())
    return total / samples


@torch.no_grad()
def is_greedy(
    model: Model, prompt: torch.Tensor, answer: torch.Tensor, *, mask_id: int | None = None, shift: bool | None = None
) -> bool:
    """Whether the model itself writes this answer, one token a call, the surest first (LLaDA's ``low_confidence``).

    Stops at the first token that differs. Arguments and errors as of :func:`log_likelihood`.
    """
    kind = family(model, mask_id, shift)
    _check(prompt, answer, kind)
    written = torch.full_like(answer, kind.mask_id)
    masked = torch.ones_like(answer, dtype=torch.bool)
    for _ in range(answer.shape[1]):
        sure, best = _log_softmax(_answer_logits(model, prompt, written, kind)).max(-1)
        place = int(sure.masked_fill(~masked, -torch.inf).argmax())
        if best[0, place] != answer[0, place]:
            return False
        written[0, place], masked[0, place] = answer[0, place], False
    return True


def _check(prompt: torch.Tensor, answer: torch.Tensor, kind: Family) -> None:
    check_ids("prompt", prompt)
    check_ids("answer", answer)
    if len(prompt) != 1 or len(answer) != 1 or answer.shape[1] == 0:
        raise ValueError(
            f"prompt is {list(prompt.shape)} and answer {list(answer.shape)}; give one sequence each, [1, tokens], and "
            "an answer of at least one token"
        )
    if kind.shift and prompt.shape[1] == 0:
        raise ValueError("the model is shifted, and nothing predicts the first token; give a prompt of at least one")


def _answer_logits(model: Model, prompt: torch.Tensor, answers: torch.Tensor, kind: Family) -> torch.Tensor:
    """Logits ``[B, L, V]`` that predict the answers ``[B, L]`` behind one prompt ``[1, P]``."""
    x = torch.cat([prompt.long().expand(len(answers), -1), answers.long()], 1)
    with exact_calls():
        logits = read_logits(model, x, **model_inputs(model, None, x.shape[1], kind.shift))
    first = prompt.shape[1] - int(kind.shift)
    return logits[:, first : first + answers.shape[1]]


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
