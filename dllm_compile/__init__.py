"""``torch.compile(model, backend="dllm")``: training-free speed for masked-diffusion language models."""

from .backend import dllm, reset, stats
from .explain import Explanation, explain
from .options import Options

__all__ = ["Explanation", "Options", "dllm", "explain", "reset", "stats"]
