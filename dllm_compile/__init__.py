"""``torch.compile(model, backend="dllm")``: training-free speed for masked-diffusion language models."""

import os

if not os.path.isdir(os.path.join(__path__[0], "passes")):  # a link that is no link: on Windows, or in an sdist
    __path__.append(os.path.dirname(__path__[0]))

from .backend import dllm, reset, stats
from .declared import exact_calls, loop
from .explain import Explanation, explain
from .generate import generate
from .interface.blocks import Masks
from .interface.mechanism import Confidences, Contexts, Facts, Mechanism, Option, RowRule
from .interface.plan import AfterLayer, LayerRows, Measured, Skipping
from .kernels.attention_weights import attention_weights
from .mechanisms import register, unregister
from .options import Options
from .prepare import prepare
from .sampler.decode import Generated
from .sampler.step import denoise_step
from .warm import Warmed, warm

__all__ = [
    "AfterLayer",
    "Confidences",
    "Contexts",
    "Explanation",
    "Facts",
    "Generated",
    "LayerRows",
    "Masks",
    "Measured",
    "Mechanism",
    "Option",
    "Options",
    "RowRule",
    "Skipping",
    "Warmed",
    "attention_weights",
    "denoise_step",
    "dllm",
    "exact_calls",
    "explain",
    "generate",
    "loop",
    "prepare",
    "register",
    "reset",
    "stats",
    "unregister",
    "warm",
]
