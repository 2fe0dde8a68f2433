"""The blocks of a sequence, as the chosen mechanisms have them."""

from __future__ import annotations

import torch

from dllm_compile.interface.blocks import Blocks
from dllm_compile.mechanisms import find_block
from dllm_compile.options import Options


def blocks_of(options: Options, response: torch.Tensor) -> Blocks:
    """The blocks of one sequence: fixed ones, or the one that a mechanism finds at each call.

    Args:
        options: what the user chose; without a ``cache`` of blocks the whole response is one.
        response: ``[B, S]`` bool, the rows of the response.
    """
    if options.cache == "none":
        return Blocks(response, None)
    return Blocks(response, options.block_length, find_block(options))
