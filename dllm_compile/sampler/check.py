"""Check what a user hands to the sampler: each mistake is an error of one sentence.

What is known without reading a tensor (kinds, shapes, dtypes) can be asked while Dynamo traces, and leaves nothing in
the graph; values are read from the device once.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import torch

from dllm_compile.compat import uncompiled
from dllm_compile.interface.mechanism import is_int, nearest, one_of
from dllm_compile.options import check_vocabulary

from .rules import RULES
from .settings import SYNONYMS, Settings

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
STEP_RULES = tuple(rule for rule in RULES if rule != "origin")
"""Rules of one step: ``origin`` draws how many tokens are written, which the loop decides."""


def kind_of(value: Any) -> str:
    """The type of a value in words, for an error."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else f"a {type(value).__name__}"


def check_ids(name: str, ids: Any) -> None:
    """Refuse anything but token ids ``[B, S]`` of at least one sequence.

    Raises:
        TypeError: it is no tensor.
        ValueError: another shape, or no integers.
    """
    if not isinstance(ids, torch.Tensor):
        raise TypeError(f"{name} is {kind_of(ids)}; give integer ids [batch, tokens], such as torch.tensor([[1, 2]])")
    if ids.dim() != 2 or ids.dtype not in INTEGERS or ids.shape[0] == 0:
        raise ValueError(f"{name} is {kind_of(ids)}; give integer ids [batch, tokens] of at least one sequence")


def check_range(name: str, low: int, high: int, vocabulary: int | None) -> None:
    """Refuse ids from ``low`` to ``high`` that are none of the ``vocabulary`` tokens of a model.

    Raises:
        ValueError: some are none.
    """
    if low < 0:
        raise ValueError(f"{name} holds the id {low}; give ids of at least 0, and padding an id of its own")
    if vocabulary is not None and high >= vocabulary:
        raise ValueError(
            f"{name} holds the id {high}, but the model embeds {vocabulary} tokens, 0 to {vocabulary - 1}; "
            "give ids of its own tokenizer"
        )


def embedded(model: Any) -> int | None:
    """Tokens that a model embeds, where its input embedding tells; ``None`` where not."""
    ask = getattr(model, "get_input_embeddings", None)
    try:
        table = ask() if ask is not None else None
    except NotImplementedError:  # transformers' word for a model that does not say
        return None
    count = getattr(table, "num_embeddings", None)
    return count if is_int(count) else None


def takes(model: Any, name: str) -> bool | None:
    """Whether a model has an input of this name; ``None`` where it takes any."""
    plain = uncompiled(model)
    try:
        given = inspect.signature(getattr(plain, "forward", plain)).parameters
    except (TypeError, ValueError):  # a callable written in C
        return None
    if name in given:
        return True
    return None if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in given.values()) else False


def check_inputs(model: Any, names: Any) -> None:
    """Refuse inputs that a model does not take.

    Raises:
        ValueError: it says which it takes, and a name is none of them.
    """
    for name in names:
        if takes(model, name) is False:
            plain = uncompiled(model)
            known = list(inspect.signature(getattr(plain, "forward", plain)).parameters)
            raise ValueError(
                f"the model takes no {name!r}; did you mean {nearest(name, known)!r}? It takes: {', '.join(known)}"
                if known
                else f"the model takes no {name!r}, nor anything else; leave it out"
            )


def check_call(model: Any, input_ids: Any, attention_mask: Any, others: dict[str, Any]) -> None:
    """Refuse what :func:`dllm_compile.generate` cannot work with, beside its settings.

    Args:
        model, input_ids, attention_mask: as a user gave them.
        others: its other arguments, by name.

    Raises:
        TypeError: one is of another kind.
        ValueError: a shape or a value is wrong.
    """
    check_model(model)
    check_ids("input_ids", input_ids)
    if input_ids.shape[1]:
        low, high = torch.stack([input_ids.min(), input_ids.max()]).tolist()
        check_range("input_ids", low, high, embedded(model))
    if attention_mask is not None:
        check_mask(attention_mask, input_ids)
    for name in ("return_dict", "output_history"):
        if not isinstance(others[name], bool):
            raise TypeError(f"{name} is {kind_of(others[name])}; give True or False")
    streamer, generator = others["streamer"], others["generator"]
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer is {kind_of(streamer)}; give an object with the methods put and end")
    if streamer is not None and input_ids.shape[0] > 1:
        raise ValueError(f"a streamer follows one sequence, not {input_ids.shape[0]}; leave it out, or split the batch")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {kind_of(generator)}; give torch.Generator(device).manual_seed(...), or None")


def check_model(model: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: it cannot.
    """
    if not callable(model):
        raise TypeError(f"model is {kind_of(model)}; give a module or a function that maps ids to logits")


def check_mask(mask: Any, ids: torch.Tensor) -> None:
    """Refuse a padding mask that is not ``[B, P]`` of 0 and 1, zeros first.

    Raises:
        TypeError: it is no tensor.
        ValueError: another shape, or other values.
    """
    batch, tokens = ids.shape
    wanted = f"[{batch}, {tokens}], 1 at the tokens of input_ids and 0 at padding"
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention_mask is {kind_of(mask)}; give a tensor {wanted}, or None where nothing is padding")
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {kind_of(mask)}; give {wanted}: it has one column a token of the prompts, "
            "none for the response"
        )
    host = mask.cpu()
    if not bool(((host == 0) | (host == 1)).all()):
        other = host[(host != 0) & (host != 1)][0].item()
        raise ValueError(f"attention_mask holds {other}; give {wanted}: it is no additive mask")
    behind = (host.bool()[:, :-1] & ~host.bool()[:, 1:]).any(1)
    if bool(behind.any()):
        row = int(behind.long().argmax())
        raise ValueError(
            f"attention_mask has padding behind tokens in sequence {row}; pad on the left, so that the response "
            "follows the prompt"
        )


def logits_in(out: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits ``[B, S, V]`` in what a model returned for ids: bare, or as ``.logits``.

    Raises:
        TypeError: it holds none.
        ValueError: they are of another shape, or no numbers of a floating dtype.
    """
    logits = out if isinstance(out, torch.Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"the model returned {kind_of(out)}; give one that returns logits [batch, tokens, vocabulary], bare or as "
            ".logits, such as lambda ids, **more: model(ids, **more)[0]"
        )
    if logits.dim() != 3 or logits.shape[:2] != ids.shape or not logits.is_floating_point():
        raise ValueError(
            f"the model returned {kind_of(logits)} for ids {list(ids.shape)}; give one that returns logits "
            "[batch, tokens, vocabulary], a row for each token"
        )
    return logits


def check_step(model: Any, x: Any, candidates: Any, count: Any, most: Any, how: dict[str, Any]) -> None:
    """Refuse what :func:`dllm_compile.denoise_step` cannot work with; numbers and tensors are not read while compiling.

    Args:
        model, x, candidates, count, most: as a user gave them.
        how: its other arguments, by name.

    Raises:
        TypeError: one is of another kind.
        ValueError: a shape, a choice or a value is wrong, or one needs another.
    """
    eager = not torch.compiler.is_compiling()
    check_model(model)
    check_ids("x", x)
    _check_tensor("candidates", candidates, x, x.shape, "bool")
    one_of("remasking", how["remasking"], STEP_RULES)
    if eager:
        _check_numbers(how)
        _check_names(model, how)
        check_inputs(model, how["inputs"])
        check_vocabulary(how["mask_id"], embedded(model))
    if count is None and most is not None:
        raise ValueError(f"most is {most!r}, but there is no count that it is the largest entry of; give both, or none")
    if count is not None:
        _check_tensor("count", count, x, x.shape[:1], "integer")
        if not is_int(most) or not 0 <= most <= x.shape[1]:
            raise ValueError(f"most is {most!r}; give the largest entry of count, from 0 to {x.shape[1]} tokens")
        if how["factor"] is not None:
            raise ValueError("count and factor both say how many tokens are written; give one of them")
    if (how["remasking"] == "random") != (how["draws"] is not None):
        draws = "missing" if how["draws"] is None else "given"
        raise ValueError(
            f"remasking is {how['remasking']!r} and draws are {draws}; give both remasking='random' and draws "
            "[batch, tokens], its confidences, or neither"
        )
    for scale, needed, wanted in (
        ("temperature", "noise", "noise [batch, tokens, vocabulary], uniform in [0, 1)"),
        ("cfg_scale", "given", "given [batch, tokens], True at the prompt"),
    ):
        if how[needed] is None and how[scale] > 0:
            raise ValueError(f"{scale} is {how[scale]!r}, but {needed} is None; give {wanted}")
    for name, shape, kind in (
        ("draws", x.shape, "floating"),
        ("noise", (*x.shape, None), "floating"),
        ("given", x.shape, "bool"),
    ):
        if how[name] is not None:
            _check_tensor(name, how[name], x, shape, kind)
    if eager and x.numel():
        _check_values(model, x, candidates, count, most, how["mask_id"])


def _check_names(model: Any, how: dict[str, Any]) -> None:
    """Refuse inputs of the model that it does not name, and whose names are almost those of an argument of the step."""
    own = [*(name for name in how if name != "inputs"), "count", "most"]
    for name in how["inputs"]:
        near = difflib.get_close_matches(SYNONYMS.get(name, name), own, n=1, cutoff=0.8)
        if near and takes(model, name) is not True:
            raise ValueError(f"denoise_step has no argument {name!r}; did you mean {near[0]!r}?")


def _check_numbers(how: dict[str, Any]) -> None:
    names = ("mask_id", "shift", "remasking", "temperature", "cfg_scale", "threshold", "factor")
    Settings(**{name: how[name] for name in names})
    for name, wanted in (("mask_id", "the token id of the mask"), ("shift", "True or False")):
        if how[name] is None:
            raise ValueError(f"{name} is None; give {wanted}")


def _check_values(
    model: Any, x: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor | None, most: Any, mask_id: int
) -> None:
    """What one read of the tensors shows."""
    asked = candidates.sum(1) if count is None else count
    found = [x.min(), x.max(), (candidates & (x != mask_id)).any(), asked.min(), asked.max()]
    low, high, filled, least, largest = torch.stack([each.long() for each in found]).tolist()
    check_range("x", low, high, embedded(model))
    if filled:
        raise ValueError(f"candidates hold positions of x that are not the mask {mask_id}; give masked ones")
    if least < 0:
        raise ValueError(f"count holds {least}; give how many tokens to write in each sequence, at least 0")
    if count is not None and largest > most:
        raise ValueError(f"count holds {largest}, but most is {most}; give most={largest}")


def _check_tensor(name: str, value: Any, x: torch.Tensor, shape: Any, kind: str) -> None:
    """Refuse anything but a tensor of a kind and shape (``None`` is any size) on the device of ``x``."""
    fits = isinstance(value, torch.Tensor) and value.dim() == len(shape) and value.device == x.device
    for i, size in enumerate(shape):
        fits = fits and (size is None or value.shape[i] == size)
    if fits and kind == "bool":
        fits = value.dtype == torch.bool
    elif fits:
        fits = value.is_floating_point() if kind == "floating" else value.dtype in INTEGERS
    if not fits:
        sizes = [size if size is not None else "vocabulary" for size in shape]
        where = f", on {value.device}" if isinstance(value, torch.Tensor) and value.device != x.device else ""
        raise (ValueError if isinstance(value, torch.Tensor) else TypeError)(
            f"{name} is {kind_of(value)}{where}; give a {kind} tensor [{', '.join(map(str, sizes))}] on {x.device}"
        )
