"""A small masked-diffusion language model that ships with the package, for tests, demonstrations and benchmarks.

It answers the problems of :mod:`dllm_compile.tiny.tasks`.  Row ``i`` of its logits predicts token ``i`` (as in LLaDA).
``examples/train_tiny.py`` trained it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .tasks import (
    FILLER,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    TASKS,
    VOCABULARY,
    Problem,
    is_exact,
    make_problem,
    problems,
)

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = [
    "FILLER",
    "PROMPT_LENGTH",
    "RESPONSE_LENGTH",
    "TASKS",
    "VOCABULARY",
    "WEIGHTS",
    "Problem",
    "decode",
    "encode",
    "is_exact",
    "load",
    "make_problem",
    "problems",
]

WEIGHTS = Path(__file__).parent / "weights"


def load(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Loads the shipped model (in evaluation mode) and its tokenizer from the package; nothing is downloaded.

    The model maps ids [B, S] to logits [B, S, V] with bidirectional attention; the mask token's id is
    ``model.config.mask_token_id`` (and ``tokenizer.mask_token_id``).

    Raises:
        RuntimeError: the installed transformers ignores ``is_causal=False`` and would run the model causally.
    """
    # Imported here: transformers takes seconds to import and is needed for nothing else in this module.
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, __version__

    if tuple(map(int, __version__.split(".")[:2])) < (5, 2):
        raise RuntimeError(
            f"transformers is {__version__}, which ignores is_causal=False: the model would attend to earlier tokens "
            "alone; install transformers 5.2 or later"
        )
    model = LlamaForCausalLM.from_pretrained(WEIGHTS, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(WEIGHTS, local_files_only=True)
    model.to(device)  # type: ignore[arg-type]  # transformers wraps this method and loses its signature
    model.eval()  # type: ignore[no-untyped-call]
    return model, tokenizer


def encode(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Token ids [B, PROMPT_LENGTH] (int64) of the problems' prompts."""
    ids: torch.Tensor = tokenizer([problem.prompt for problem in problems], return_tensors="pt").input_ids
    return ids


def decode(ids: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts of response ids [B, R], without the filler at their ends.

    Mask tokens that are left show as ``[MASK]``, so that an unfinished response is never taken for an answer.
    """
    return [text.rstrip(f" {FILLER}") for text in tokenizer.batch_decode(ids, skip_special_tokens=False)]
