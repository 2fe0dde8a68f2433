"""``python -m dllm_compile demo | bench | explain``."""

from __future__ import annotations

import os
import sys
from typing import Any

from .bench.command import Parser, dispatch, leave, require, whole


def explain_main(argv: list[str]) -> None:
    """``explain``: of the embedded model, or of a local checkpoint that transformers can load."""
    import torch

    from . import tiny
    from .explain import explain
    from .options import Options

    parser = Parser(prog="dllm_compile explain", description="What the compiler finds in a model.")
    parser.add_argument("--model", help="folder or name of a checkpoint; the embedded model by default")
    parser.add_argument("--mask-id", type=whole(0), help="mask token; by default what the configuration says")
    parser.add_argument("--method", default="dllm-cache")
    parser.add_argument("--prompt", type=whole(), default=tiny.PROMPT_LENGTH)
    parser.add_argument("--response", type=whole(), default=tiny.RESPONSE_LENGTH)
    given = parser.parse_args(argv)
    require(parser, "demo", "transformers", "safetensors")
    try:
        Options(method=given.method)
    except ValueError as error:
        parser.error(f"argument --method: {error}")
    model = tiny.load()[0] if given.model is None else _checkpoint(parser, given.model)
    mask_id = given.mask_id if given.mask_id is not None else getattr(model.config, "mask_token_id", None)
    if mask_id is None:
        parser.error(f"{given.model} does not say its mask token; give --mask-id")
    ids = torch.full((1, given.prompt + given.response), int(mask_id))
    ids[:, : given.prompt] = 0 if mask_id == 1 else 1
    try:
        found = explain(model, ids, method=given.method, mask_id=int(mask_id))
    except ValueError as error:
        parser.error(str(error))
    print(found)


def _checkpoint(parser: Parser, name: str) -> Any:
    """A model that transformers loads from a folder, or by the name of a repository."""
    import transformers

    if not os.path.isdir(name) and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        parser.error(f"argument --model: {name!r} is no folder; give one with a config.json, or OWNER/NAME on the hub")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=True)
        heads = " ".join(config.architectures or ())
        kind = "ForMaskedLM" if "MaskedLM" in heads else "ForCausalLM" if "CausalLM" in heads else ""
        loader = getattr(transformers, f"AutoModel{kind}")
        return loader.from_pretrained(name, config=config, trust_remote_code=True).eval()
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        parser.error(f"argument --model: transformers cannot load {name!r}: {reason}")


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a subcommand; ``argv`` are the words behind ``python -m dllm_compile``."""
    try:
        from .bench import bench, demo

        commands = {"demo": demo.main, "bench": bench.main, "explain": explain_main}
        dispatch(commands, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        leave(130, "dllm_compile: interrupted")


if __name__ == "__main__":
    main()
