"""The random-weight model of the benchmarks, and one generation by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .contest import Job


@dataclass(frozen=True)
class Setting:
    """A random-weight bidirectional Llama and one generation; the defaults are the project's reference figure.

    Attributes:
        layers, width, mlp, heads, vocabulary: of the model, float32.
        prompt, response, block: tokens; one token is freed a step.
        baseline_steps: forwards timed for eager and Inductor, whose steps all cost the same.
        prompt_interval, response_interval: of dLLM-Cache; its ratio is 0.25.
        cache_block: block length of Fast-dLLM's caches, and of the loop they are timed with.
    """

    layers: int = 12
    width: int = 768
    mlp: int = 3072
    heads: int = 12
    vocabulary: int = 32000
    prompt: int = 512
    response: int = 256
    block: int = 8
    baseline_steps: int = 16
    prompt_interval: int = 50
    response_interval: int = 7
    cache_block: int = 32


def random_model(setting: Setting, seed: int = 0) -> Any:
    """The model of a setting."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=setting.width,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        vocab_size=setting.vocabulary,
        max_position_embeddings=8192,
        is_causal=False,  # type: ignore[call-arg]
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def job_of(setting: Setting) -> Job:
    """A random prompt and a masked response."""
    mask_id = setting.vocabulary - 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, mask_id, (1, setting.prompt + setting.response), generator=generator)
    ids[:, setting.prompt :] = mask_id
    return Job(ids, setting.prompt, setting.response, setting.block, mask_id)
