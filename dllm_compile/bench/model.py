"""The random-weight models of the benchmarks, one generation by them, and who takes part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_compile.mechanisms import METHODS, PRESETS

from .contest import Contender, Job

KINDS = ("Llama", "Qwen2")


@dataclass(frozen=True)
class Setting:
    """A random-weight bidirectional model and one generation; the defaults are the project's reference figure.

    Attributes:
        kind: architecture, one of :data:`KINDS`.
        layers, width, mlp, heads, kv_heads, vocabulary: of the model; 0 for as many heads of keys as of queries.
        theta: base of the rotary positions.
        prompt, response, block: tokens; one token is freed a step.
        baseline_steps: forwards timed for eager and Inductor, whose steps all cost the same.
        prompt_interval, response_interval: of dLLM-Cache; its ratio is 0.25.
        cache_block: block length of Fast-dLLM's caches, and of the loop they are timed with.
    """

    kind: str = "Llama"
    layers: int = 12
    width: int = 768
    mlp: int = 3072
    heads: int = 12
    kv_heads: int = 0
    vocabulary: int = 32000
    theta: int = 10000
    prompt: int = 512
    response: int = 256
    block: int = 8
    baseline_steps: int = 16
    prompt_interval: int = 50
    response_interval: int = 7
    cache_block: int = 32


SHAPES = {
    "llada-8b": Setting(
        layers=32,
        width=4096,
        mlp=12288,
        heads=32,
        vocabulary=126464,
        theta=500000,
        prompt=256,
        block=32,
        baseline_steps=8,
    ),
    "dream-7b": Setting(
        kind="Qwen2",
        layers=28,
        width=3584,
        mlp=18944,
        heads=28,
        kv_heads=4,
        vocabulary=152064,
        theta=1000000,
        prompt=256,
        block=32,
        baseline_steps=8,
    ),
    "tiny": Setting(
        layers=4,
        width=128,
        mlp=256,
        heads=4,
        vocabulary=512,
        prompt=64,
        response=64,
        block=32,
        baseline_steps=8,
        prompt_interval=16,
    ),
}
"""Models by name, as published (LLaDA arXiv 2502.09992, Dream arXiv 2508.15487), and one for a CPU."""


def check_model(setting: Setting) -> None:
    """Refuse a model that cannot be built.

    Raises:
        ValueError: its numbers do not go together.
    """
    keys = setting.kv_heads or setting.heads
    if setting.width % (2 * setting.heads):
        raise ValueError(
            f"a width of {setting.width} cannot be divided among {setting.heads} heads of an even width, as rotary "
            f"positions need; give a multiple of {2 * setting.heads}"
        )
    if setting.heads % keys:
        raise ValueError(
            f"{setting.heads} heads of queries cannot share {keys} of keys; give kv_heads that divide heads"
        )


def check_lengths(setting: Setting) -> None:
    """Refuse a generation that no loop in blocks can make.

    Raises:
        ValueError: its lengths do not go together.
    """
    for block in (setting.block, setting.cache_block):
        if setting.response % block:
            raise ValueError(f"a response of {setting.response} tokens is no multiple of a block of {block}")
    if setting.cache_block < 4:
        raise ValueError(f"a cache block of {setting.cache_block} tokens cannot be freed 4 a call; give at least 4")


def random_model(setting: Setting, seed: int = 0, device: torch.device | str = "cpu") -> Any:
    """The model of a setting, float32 on a CPU and else bfloat16.

    Weights are drawn where they stay, and in their dtype: no other memory ever holds the model.
    """
    import transformers

    torch.manual_seed(seed)
    config = getattr(transformers, f"{setting.kind}Config")(
        hidden_size=setting.width,
        intermediate_size=setting.mlp,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.kv_heads or setting.heads,
        vocab_size=setting.vocabulary,
        rope_theta=setting.theta,
        max_position_embeddings=8192,
        is_causal=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            return getattr(transformers, f"{setting.kind}ForCausalLM")(config).eval()
    finally:
        torch.set_default_dtype(usual)


def job_of(setting: Setting, batch: int = 1, device: torch.device | str = "cpu") -> Job:
    """Random prompts and masked responses."""
    mask_id = setting.vocabulary - 1
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, mask_id, (batch, setting.prompt + setting.response), generator=generator)
    ids[:, setting.prompt :] = mask_id
    return Job(ids.to(device), setting.prompt, setting.response, setting.block, mask_id)


def contenders(setting: Setting) -> list[Contender]:
    """Baselines, the neutral setting, and each method. Of the last three the first frees four tokens a call, the next
    as many as its rule says, and the last as many as its drafts are right about.
    """
    intervals = {"prompt_interval": setting.prompt_interval, "response_interval": setting.response_interval}
    blocks = {"method": "fast-dllm", "block_length": setting.cache_block}
    dual = {**blocks, "cache": "dual"}
    streaming = {**METHODS["streaming-dllm"], "method": "streaming-dllm", "block_length": setting.cache_block}
    return [
        Contender("eager"),
        Contender("inductor", plain=True),
        Contender("neutral", {"prompt_interval": 1, "response_interval": 1}),
        Contender("dllm-cache", intervals),
        Contender("fast-dllm prefix", {**blocks, "cache": "prefix"}),
        Contender("fast-dllm dual", dual),
        Contender("dsb", {"method": "dsb", "block_length": setting.cache_block}),
        Contender("dinfer", {"method": "dinfer", "block_length": setting.cache_block}),
        Contender("sparse-dllm", {**blocks, "method": "sparse-dllm"}),
        Contender("flashblock", {**blocks, "method": "flashblock"}),
        Contender("dyllm", {"method": "dyllm", "shift": False}),
        Contender("es-dllm", {**blocks, "method": "es-dllm"}),
        Contender("streaming-dllm", streaming),
        Contender("dual, 4 a call", dual, steps=setting.response // 4),
        Contender("fast-dllm++", {**PRESETS["fast-dllm++"], "block_length": setting.cache_block}, settings={}),
        Contender("dual, 4 drafts", dual, settings={"drafts": 4}),
    ]
