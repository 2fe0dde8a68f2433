"""One denoising step: token ids in, token ids out. Plain PyTorch that TorchDynamo traces to one graph.

What changes from step to step is a tensor: the ids, the candidates, how many to free, the noise. Nothing is written in
place and no size depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .check import check_step, logits_in
from .rules import Bound, Rule, confidence, gumbel, written

Model = Callable[..., Any]


def read_logits(model: Model, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits ``[B, S, V]`` of ids ``[B, S]`` int64, from a model that returns them bare or as ``.logits``.

    Raises:
        TypeError, ValueError: it returns something else.
    """
    out = model(ids, **inputs)
    return logits_in(out, ids)


def guided_logits(
    read: Callable[..., torch.Tensor],
    x: torch.Tensor,
    *,
    mask_id: int,
    shift: bool,
    cfg_scale: float,
    given: torch.Tensor | None,
    **inputs: Any,
) -> torch.Tensor:
    """Logits ``[B, S, V]`` whose row ``i`` predicts token ``i``, with classifier-free guidance where asked for.

    Guidance runs ``x`` and a copy without its prompt as one batch and gives ``u + (cfg_scale + 1)(c - u)`` (LLaDA).

    Args:
        read: maps ids and ``inputs`` to logits.
        x: ``[B, S]`` int64.
        mask_id: what stands for the prompt in the unconditional half.
        shift: the model's row ``i - 1`` predicts token ``i`` (Dream).
        cfg_scale: 0 for none.
        given: ``[B, S]`` bool, the prompt; required with guidance.
        inputs: further inputs of the model; tensors of a sequence have the batch first.
    """
    if cfg_scale > 0:
        assert given is not None
        twice = {name: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        conditional, free = read(torch.cat([x, torch.where(given, mask_id, x)]), **twice).chunk(2)
        logits = free + (cfg_scale + 1) * (conditional - free)
    else:
        logits = read(x, **inputs)
    return torch.cat([logits[:, :1], logits[:, :-1]], 1) if shift else logits


def proposals(
    model: Model, x: torch.Tensor, *, mask_id: int, shift: bool, remasking: str, **inputs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the model once on ids ``[N, S]`` int64.

    Args:
        model: maps ids to logits.
        x: the ids.
        mask_id, shift, remasking: as in :func:`denoise_step`.
        inputs: of the model; tensors of one sequence serve all.

    Returns:
        The best token of each position, ``[N, S]`` int64, and how sure one is of it, ``[N, S]`` floating.
    """

    def read(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        return read_logits(model, ids, **more)

    logits = guided_logits(read, x, mask_id=mask_id, shift=shift, cfg_scale=0.0, given=None, **inputs)
    token = logits.argmax(-1)
    return token, confidence(logits.softmax(-1), token, remasking)


def denoise_step(
    model: Model,
    x: torch.Tensor,
    candidates: torch.Tensor,
    count: torch.Tensor | None = None,
    most: int | None = None,
    *,
    mask_id: int,
    shift: bool = False,
    remasking: str = "low_confidence",
    temperature: float = 0.0,
    cfg_scale: float = 0.0,
    threshold: float | None = None,
    factor: float | None = None,
    given: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    draws: torch.Tensor | None = None,
    **inputs: Any,
) -> torch.Tensor:
    """Run the model once and write the surest of the candidates.

    Args:
        model: maps ids ``[B, S]`` to logits ``[B, S, V]``, bare or as ``.logits``; compiled or not.
        x: ``[B, S]`` integer token ids.
        candidates: ``[B, S]`` bool, masked positions that may be written.
        count: ``[B]`` int64, tokens to write in each sequence, no more than it has candidates; ``None`` leaves it to
            ``threshold`` or ``factor``, or writes all.
        most: the largest entry of ``count``, or more.
        mask_id: the mask token.
        shift: row ``i - 1`` of the logits predicts token ``i``.
        remasking: rule of confidence, see :func:`dllm_compile.sampler.rules.confidence`: ``"low_confidence"``,
            ``"maskgit_plus"``, ``"entropy"``, ``"topk_margin"``, or ``"random"``, which takes ``draws``.
        temperature: of the Gumbel noise; 0 takes the best token.
        cfg_scale: scale of classifier-free guidance; 0 for none.
        threshold, factor: of Fast-dLLM, see :func:`dllm_compile.sampler.rules.chosen`.
        given: ``[B, S]`` bool, the prompt; required with ``cfg_scale``.
        noise: ``[B, S, V]`` float64, uniform; required with ``temperature``.
        draws: ``[B, S]``, the confidences of ``"random"``.
        inputs: further inputs of the model, such as ``attention_mask``. A name that the model does not have is refused
            where it is almost one of the arguments above.

    Returns:
        ``[B, S]`` int64, a new tensor.

    Raises:
        TypeError, ValueError: an argument is of another kind or shape, contradicts another, or holds what it cannot
            mean. Values (numbers, and what tensors hold) are not looked at where the step is compiled.
    """
    how: dict[str, Any] = {"mask_id": mask_id, "shift": shift, "remasking": remasking, "temperature": temperature}
    how |= {"cfg_scale": cfg_scale, "threshold": threshold, "factor": factor}
    tensors: dict[str, Any] = {"given": given, "noise": noise, "draws": draws}
    check_step(model, x, candidates, count, most, {**how, **tensors, "inputs": inputs})
    return surest(model, x, candidates, count, most, **how, **tensors, **inputs)[0]


def surest(
    model: Model,
    x: torch.Tensor,
    candidates: torch.Tensor,
    count: torch.Tensor | None = None,
    most: int | None = None,
    *,
    mask_id: int,
    shift: bool,
    remasking: str,
    temperature: float,
    cfg_scale: float,
    threshold: float | None,
    factor: float | None,
    given: torch.Tensor | None,
    noise: torch.Tensor | None,
    draws: torch.Tensor | None,
    block: torch.Tensor | None = None,
    waiting: torch.Tensor | None = None,
    rule: Rule | None = None,
    allowed: Rule | None = None,
    moved: Bound | None = None,
    ends: Rule | None = None,
    eos: tuple[int, ...] = (),
    stamp: torch.Tensor | None = None,
    **inputs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`denoise_step` of arguments that are known to be right; mechanisms may choose the tokens, see
    :func:`dllm_compile.sampler.rules.written`, and look for the end, see :func:`ending`.

    With ``stamp`` ``[1]`` int64, a number above 0 that no call before had, only candidates are written whose logits are
    of this call: a row of logits that is kept of an earlier one bears its number.

    Raises:
        TypeError, ValueError: the model returns no logits, or ``noise`` is not as wide as they are.
    """

    def read(ids: torch.Tensor, **more: Any) -> torch.Tensor:
        return read_logits(model, ids, **more)

    logits = guided_logits(read, x, mask_id=mask_id, shift=shift, cfg_scale=cfg_scale, given=given, **inputs)
    if temperature > 0:
        assert noise is not None
        if noise.shape[-1] != logits.shape[-1]:
            raise ValueError(
                f"noise is for {noise.shape[-1]} tokens, but the model's logits are of {logits.shape[-1]}; "
                "give noise [batch, tokens, vocabulary]"
            )
        token = gumbel(logits, noise, temperature).argmax(-1)
    else:
        token = logits.argmax(-1)
    sure = confidence(logits.softmax(-1), token, remasking) if draws is None else draws
    if stamp is not None:  # compared with what is made of the ids: behind the head, for all rows
        candidates = candidates & (token * 0 + stamp == torch.where(x == mask_id, stamp, 0))
    counted = count, most, threshold, factor
    asked: dict[str, Any] = {"block": block, "rule": rule, "allowed": allowed, "moved": moved}
    masked = x == mask_id if waiting is None else waiting
    new = torch.where(written(sure, candidates, masked, *counted, **asked), token, x)
    return new, None if ends is None else ending(logits, masked, eos, ends, block)


def ending(
    logits: torch.Tensor, masked: torch.Tensor, eos: tuple[int, ...], ends: Rule, block: torch.Tensor | None
) -> torch.Tensor:
    """Positions ``[B, S]`` bool that mechanisms take for the end of a response.

    Args:
        logits: ``[B, S, V]``, row ``i`` predicts token ``i``.
        masked: ``[B, S]`` bool, positions that hold the mask.
        eos: ids that end a response.
        ends: what the mechanisms say of the positions whose likeliest token is one of these.
        block: ``[B, S]`` bool, positions of the block that each sequence is at.
    """
    best, likely = logits.argmax(-1), logits.softmax(-1).amax(-1)
    found = best == eos[0]
    for token in eos[1:]:
        found = found | (best == token)
    found = found & masked
    return ends(torch.where(found, likely, -torch.inf), found, masked, block) & found
