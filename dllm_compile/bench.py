"""``python -m dllm_compile bench``: ratios in one run against named baselines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .loop import quota_loop


@dataclass(frozen=True)
class Setting:
    """One random-weight model and one generation.

    Attributes:
        layers, width, mlp, heads, vocabulary: of a bidirectional Llama.
        prompt, response, block: tokens.
        steps: forward calls that are timed at most; 0 for one per response token.
    """

    layers: int = 12
    width: int = 768
    mlp: int = 3072
    heads: int = 12
    vocabulary: int = 32000
    prompt: int = 512
    response: int = 256
    block: int = 8
    steps: int = 0


def random_model(setting: Setting, seed: int = 0) -> Any:
    """A bidirectional Llama in transformers with random float32 weights."""
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
        is_causal=False,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return transformers.LlamaForCausalLM(config).eval()


@dataclass
class Row:
    """What one contender did."""

    name: str
    seconds: float
    tokens_per_second: float
    forwards: int
    first_call_seconds: float
    token_agreement: float
    speedup_eager: float = 0.0
    speedup_inductor: float = 0.0


def run(setting: Setting, contenders: dict[str, Callable[[Any], Any]], progress: Any = sys.stderr) -> list[Row]:
    """Time one generation of each contender with the same loop.

    Args:
        setting: model and lengths.
        contenders: name to a function that makes the callable from the model; ``eager`` must be first.
        progress: where to say what runs.
    """
    model = random_model(setting)
    mask_id = setting.vocabulary - 1
    start = torch.randint(0, mask_id, (1, setting.prompt + setting.response), generator=torch.Generator().manual_seed(1))
    start[:, setting.prompt :] = mask_id
    rows: list[Row] = []
    reference: torch.Tensor | None = None
    for name, make in contenders.items():
        call = make(model)
        first, seconds, calls, x = _generation(call, start.clone(), setting, mask_id)
        decoded = (x != mask_id) & (start == mask_id)
        if reference is None:
            reference = x
        agreement = (x == reference)[decoded].float().mean().item()
        count = int(decoded.sum())
        rows.append(Row(name, seconds, count / seconds, calls, first, agreement))
        print(f"{name}: {count / seconds:.2f} tokens/s, first call {first:.1f} s", file=progress, flush=True)
        torch._dynamo.reset()
    for row in rows:
        row.speedup_eager = row.tokens_per_second / rows[0].tokens_per_second
        row.speedup_inductor = row.tokens_per_second / rows[min(1, len(rows) - 1)].tokens_per_second
    return rows


def _generation(
    call: Callable[[torch.Tensor], Any], x: torch.Tensor, setting: Setting, mask_id: int
) -> tuple[float, float, int, torch.Tensor]:
    """Warm up on a whole generation's variants, then time one generation."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = call(ids).logits
        return out

    with torch.no_grad():
        begin = time.perf_counter()
        logits(x)
        first = time.perf_counter() - begin
        for warm in (True, False):
            ids = x.clone()
            calls = 0
            begin = time.perf_counter()
            limit = min(setting.steps or setting.response, setting.response)
            for _ in quota_loop(logits, ids, setting.prompt, setting.response, setting.block, mask_id):
                calls += 1
                if calls >= (12 if warm else limit):
                    break
            seconds = time.perf_counter() - begin
    return first, seconds, calls, ids


def main(argv: list[str]) -> None:
    """Command line."""
    import argparse

    import dllm_compile

    parser = argparse.ArgumentParser(prog="dllm_compile bench", description=__doc__)
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", help="write the rows to this file")
    given = vars(parser.parse_args(argv))
    target = given.pop("json")
    setting = Setting(**given)
    options = {"prompt_interval": 50, "response_interval": 7, "transfer_ratio": 0.25, "mask_id": setting.vocabulary - 1}
    neutral = {**options, "prompt_interval": 1, "response_interval": 1}

    def compiled(options: dict[str, Any]) -> Callable[[Any], Any]:
        return lambda model: torch.compile(model, backend=dllm_compile.dllm, options=options)

    contenders: dict[str, Callable[[Any], Any]] = {
        "eager": lambda model: model,
        "inductor": torch.compile,
        "dllm neutral": compiled(neutral),
        "dllm-cache": compiled(options),
    }
    rows = run(setting, contenders)
    for row in rows:
        print(row)
    if target:
        with open(target, "w") as file:
            json.dump({"setting": asdict(setting), "rows": [asdict(row) for row in rows]}, file, indent=1)
