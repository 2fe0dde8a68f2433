"""Small random models of transformers, bidirectional, as users hand them to the backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

import dllm_compile

from . import shared

VOCABULARY = 61
MASK = VOCABULARY - 1
IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": VOCABULARY}
CAUSAL_LM = {**SHAPE, **IDS, "num_key_value_heads": 2, "intermediate_size": 48, "is_causal": False, "use_cache": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def _encoder(**more: Any) -> dict[str, Any]:
    return {**SHAPE, "intermediate_size": 48, **more}


BUILD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", CAUSAL_LM),
    "llama-cache": ("LlamaForCausalLM", "LlamaConfig", {**CAUSAL_LM, "use_cache": True}),
    "llama-eager": ("LlamaForCausalLM", "LlamaConfig", {**CAUSAL_LM, "attn_implementation": "eager"}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", CAUSAL_LM),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**CAUSAL_LM, "head_dim": 8}),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**CAUSAL_LM, **EXPERTS, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**CAUSAL_LM, **EXPERTS}),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        _encoder(local_attention=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    ),
    "esm": (
        "EsmForMaskedLM",
        "EsmConfig",
        _encoder(mask_token_id=MASK, pad_token_id=0, position_embedding_type="rotary"),
    ),
    "esm-learned": (
        "EsmForMaskedLM",
        "EsmConfig",
        _encoder(mask_token_id=MASK, pad_token_id=0, position_embedding_type="absolute", token_dropout=True),
    ),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _encoder(pad_token_id=0, max_position_embeddings=128)),
}


SINGLE = {"llama-eager", "qwen3-moe", "olmoe"}
"""Models whose own code computes in float32 whatever their dtype, or has no float64 kernel."""


def dtype_of(name: str) -> torch.dtype:
    """The most precise dtype a model really runs in."""
    return torch.float32 if name in SINGLE else torch.float64


def build(name: str, dtype: torch.dtype | None = None, seed: int = 0, **more: Any) -> torch.nn.Module:
    """A random model by short name; ``more`` overrides its configuration."""
    cls, config, settings = BUILD[name]
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(getattr(transformers, config)(**{**settings, **more}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.to(dtype or dtype_of(name)).eval()


def compiled(model: Callable[..., Any], *, dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """The model behind the backend, uncompiled graphs unless told otherwise; see :mod:`tests.shared`.

    With ``dynamic=True`` Dynamo leaves sizes open from the first call on: Inductor makes code once, not for a graph of
    fixed sizes and again for one of open sizes.
    """
    options = {"lowering": "eager", "mask_id": MASK, **options}
    if shared.in_use():
        return shared.compiled(model, dynamic=bool(dynamic), **options)
    return torch.compile(model, backend="dllm", dynamic=dynamic, options=options)


def compiled_loop(model: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    """The same; all calls are declared to be one loop, for tests that fill tokens which are not the model's."""
    return in_a_loop(compiled(model, **options))


def in_a_loop(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` declared to be part of one loop, whichever ids it gets."""
    declared = dllm_compile.loop()

    def inside(*args: Any, **more: Any) -> Any:
        with declared:
            return call(*args, **more)

    return inside


def start(prompt: int, response: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random prompts and a masked response, ``[batch, prompt + response]``."""
    ids = torch.randint(3, MASK, (batch, prompt + response), generator=torch.Generator().manual_seed(seed))
    ids[:, prompt:] = MASK
    return ids
