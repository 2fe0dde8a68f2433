"""``python -m dllm_compile bench``: a random-weight model, ratios in one run against named baselines."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .contest import Job, Row, contenders, finish, play, relative_flops
from .table import print_rows


@dataclass(frozen=True)
class Setting:
    """A random-weight bidirectional Llama and one generation; the defaults are the project's reference figure.

    Attributes:
        layers, width, mlp, heads, vocabulary: of the model, float32.
        prompt, response, block: tokens; one token is freed a step.
        baseline_steps: forwards timed for eager and Inductor, whose steps all cost the same.
        prompt_interval, response_interval: of dLLM-Cache; its ratio is 0.25.
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


def run(setting: Setting) -> list[Row]:
    """Time eager, plain Inductor, the neutral setting and dLLM-Cache on one model."""
    model, job = random_model(setting), job_of(setting)
    options = {"prompt_interval": setting.prompt_interval, "response_interval": setting.response_interval}
    entrants = contenders(mask_id=job.mask_id, **options)
    neutral = {"mask_id": job.mask_id, "prompt_interval": 1, "response_interval": 1}
    entrants["neutral"] = contenders(**neutral)["dllm-cache"]
    rows: list[Row] = []
    reference: torch.Tensor | None = None
    for name, make in entrants.items():
        cached = name == "dllm-cache"
        warm = setting.prompt_interval + 2 if cached else 3
        row, (ids,) = play(name, make, model, [job], warm, None if cached else setting.baseline_steps)
        done = (ids != job.mask_id) & (job.ids == job.mask_id)
        row.tokens = int(done.sum())
        reference = ids if reference is None else reference
        both = done & (reference != job.mask_id)
        row.same_tokens = (ids == reference)[both].float().mean().item()
        row.flops = relative_flops(row, model, job, options if cached else neutral)
        rows.append(row)
        print(f"{name}: {row.forwards} forwards in {row.seconds:.1f} s", file=sys.stderr, flush=True)
    return finish(rows)


def main(argv: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="dllm_compile bench", description=__doc__)
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", help="also write the rows to this file")
    given = vars(parser.parse_args(argv))
    target = given.pop("json")
    setting = Setting(**given)
    rows = run(setting)
    print_rows(f"random Llama, {setting}", rows)
    cached = next(row for row in rows if row.name == "dllm-cache")
    print(f"realised speed-up over FLOP reduction, against eager: {cached.vs_eager * cached.flops:.2f}")
    if target:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        with open(target, "w", encoding="utf-8") as file:
            json.dump({"setting": asdict(setting), **machine, "rows": [asdict(row) for row in rows]}, file, indent=1)
