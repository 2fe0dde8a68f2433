"""``torch.compile(model, backend="dllm")``: training-free speed for masked-diffusion language models."""

from .backend import dllm, reset
from .options import Options

__all__ = ["Options", "dllm", "reset"]
