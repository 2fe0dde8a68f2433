"""``python -m dllm_compile bench``: a random-weight model, ratios in one run against named baselines."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import frontier, kernel_bench
from .contest import Contender, Job, Row, finish, play, relative_flops
from .table import print_rows


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


def contenders(setting: Setting) -> list[Contender]:
    """Baselines, the neutral setting, and each method; the last frees four tokens a call."""
    intervals = {"prompt_interval": setting.prompt_interval, "response_interval": setting.response_interval}
    blocks = {"method": "fast-dllm", "block_length": setting.cache_block}
    dual = {**blocks, "cache": "dual"}
    return [
        Contender("eager"),
        Contender("inductor", plain=True),
        Contender("neutral", {"prompt_interval": 1, "response_interval": 1}),
        Contender("dllm-cache", intervals, warm=setting.prompt_interval + 2),
        Contender("fast-dllm prefix", {**blocks, "cache": "prefix"}, warm=setting.cache_block + 2),
        Contender("fast-dllm dual", dual, warm=setting.cache_block + 2),
        Contender("dual, 4 a call", dual, steps=setting.response // 4, warm=setting.cache_block // 4 + 2),
    ]


def run(setting: Setting) -> list[Row]:
    """Time every contender on one model."""
    model, job = random_model(setting), job_of(setting)
    rows: list[Row] = []
    reference: torch.Tensor | None = None
    for contender in contenders(setting):
        blocks = contender.options is not None and "block_length" in contender.options
        mine = replace(job, block=setting.cache_block) if blocks else job
        every = contender.options is None or contender.name == "neutral"
        row, (ids,) = play(contender, model, [mine], setting.baseline_steps if every else None)
        done = (ids != job.mask_id) & (job.ids == job.mask_id)
        row.tokens = int(done.sum())
        reference = ids if reference is None else reference
        both = done & (reference != job.mask_id)
        row.same_tokens = (ids == reference)[both].float().mean().item()
        row.flops = relative_flops(row, model, job, contender.options or {})
        rows.append(row)
        print(f"{row.name}: {row.forwards} forwards in {row.seconds:.1f} s", file=sys.stderr, flush=True)
    return finish(rows)


def _block_cost(setting: Setting, rows: list[Row]) -> str:
    """A dual block's step against its share of a full step."""
    by_name = {row.name: row for row in rows}
    dual, full = by_name["fast-dllm dual"], by_name["inductor"].milliseconds["plain"]
    block = dual.milliseconds.get("block", 0.0)
    active = dual.rows.get("block", 0) / max(dual.steps.get("block", 0), 1)
    part = block / (full * active / (setting.prompt + setting.response))
    return f"dual: a block step takes {block:.1f} ms, {part:.2f} of rows / S of a full step's {full:.1f} ms"


def main(argv: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="dllm_compile bench", description=__doc__)
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="instead draw accuracy against speed on the embedded model to this PNG file")
    parser.add_argument("--confidence", action="store_true", help="instead time the confidence operation alone")
    given = vars(parser.parse_args(argv))
    target, picture = given.pop("json"), given.pop("plot")
    if given.pop("confidence"):
        kernel_bench.main()
        return
    if picture:
        frontier.main(picture, target)
        return
    setting = Setting(**given)
    rows = run(setting)
    print_rows(f"random Llama, {setting}", rows)
    cached = next(row for row in rows if row.name == "dllm-cache")
    print(f"realised speed-up over FLOP reduction, against eager: {cached.vs_eager * cached.flops:.2f}")
    print(_block_cost(setting, rows))
    if target:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        with open(target, "w", encoding="utf-8") as file:
            json.dump({"setting": asdict(setting), **machine, "rows": [asdict(row) for row in rows]}, file, indent=1)
