"""Find the input that the tokens enter by: ids, or the hidden state that another graph made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.core.arguments import attention, attention_arguments
from dllm_compile.core.errors import TokensUnseen
from dllm_compile.core.graph import output_node, placeholders
from dllm_compile.core.layout import Factor, Layout
from dllm_compile.core.ranks import looks_up
from dllm_compile.core.units import closure


def find_seed(graph: torch.fx.Graph, args: Sequence[Any]) -> tuple[torch.fx.Node, Layout]:
    """The placeholder that holds the tokens, and its layout ``[B, S]`` or ``[B, S, d]``.

    It is what attention's values are made of: keys and queries also read positions, values read the tokens alone.

    Raises:
        TokensUnseen: there is none, or more than one.
    """
    names = placeholders(graph)
    calls = [node for node in graph.nodes if node.target is attention]
    roots = list(output_node(graph).all_input_nodes)
    if calls:
        roots = [attention_arguments(calls[0].args, calls[0].kwargs).value]
    behind = closure([n for n in roots if isinstance(n, torch.fx.Node)], set())
    tensors = {n: a for n, a in zip(names, args, strict=True) if n in behind and is_input(a)}
    ids = [n for n, a in tensors.items() if _are_ids(a) and _is_looked_up(n)]
    if len(ids) > 1:
        ids = _token_ids(ids)
    if ids:
        batch, tokens = tensors[ids[0]].shape
        return ids[0], ((Factor("B", batch),), (Factor("T", tokens),))
    hidden = [n for n, a in tensors.items() if _is_hidden(a)]
    if len(hidden) == 1:
        batch, tokens, width = tensors[hidden[0]].shape
        return hidden[0], ((Factor("B", batch),), (Factor("T", tokens),), (Factor("", width),))
    if not ids and not hidden:
        raise TokensUnseen("no input looks like token ids or a hidden state")
    raise TokensUnseen(f"{len(hidden)} inputs look like a hidden state: {', '.join(n.name for n in hidden)}")


def refuse_without_tokens(args: Sequence[Any]) -> None:
    """Refuse a graph that has no tokens among its inputs, before any pass reads its calls.

    Raises:
        TokensUnseen: none of its inputs has the shape of token ids or of a hidden state.
    """
    given = [value for value in args if is_input(value)]
    if not any(_is_hidden(value) or _are_ids(value) for value in given):
        raise TokensUnseen("no input looks like token ids or a hidden state")


def _are_ids(value: torch.Tensor) -> bool:
    return value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def _is_hidden(value: torch.Tensor) -> bool:
    return value.dim() == 3 and value.is_floating_point()


def is_input(value: Any) -> bool:
    """Whether an argument may be another at another call: a tensor that is no parameter."""
    return isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter)


def _is_looked_up(node: torch.fx.Node) -> bool:
    """Whether an embedding reads a placeholder, perhaps cast or masked on the way."""
    return any(
        (looks_up(user) and user.args[0] is node)
        or (
            user.op == "call_method"
            and user.target in ("to", "long", "clone", "contiguous", "view")
            and _is_looked_up(user)
        )
        for user in node.users
    )


def _token_ids(candidates: list[torch.fx.Node]) -> list[torch.fx.Node]:
    """Among several looked-up inputs, the one not named for positions or segments."""
    other = ("position", "token_type", "segment")
    named = [n for n in candidates if not any(word in n.name for word in other)]
    return (named or candidates)[:1]
