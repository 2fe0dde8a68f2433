"""``python -m dllm_compile demo | bench | explain``."""

from __future__ import annotations

import argparse
import sys


def explain_main(argv: list[str]) -> None:
    """``explain``: of the embedded model, or of a local checkpoint that transformers can load."""
    import torch

    from . import tiny
    from .explain import explain

    parser = argparse.ArgumentParser(prog="dllm_compile explain", description="What the compiler finds in a model.")
    parser.add_argument("--model", help="folder or name of a checkpoint; the embedded model by default")
    parser.add_argument("--mask-id", type=int, help="mask token; by default what the configuration says")
    parser.add_argument("--method", default="dllm-cache")
    parser.add_argument("--prompt", type=int, default=tiny.PROMPT_LENGTH)
    parser.add_argument("--response", type=int, default=tiny.RESPONSE_LENGTH)
    given = parser.parse_args(argv)
    if given.model is None:
        model = tiny.load()[0]
        mask_id = int(model.config.mask_token_id)
    else:
        import transformers

        config = transformers.AutoConfig.from_pretrained(given.model, trust_remote_code=True)
        heads = " ".join(config.architectures or ())
        kind = "ForMaskedLM" if "MaskedLM" in heads else "ForCausalLM" if "CausalLM" in heads else ""
        loader = getattr(transformers, f"AutoModel{kind}")
        model = loader.from_pretrained(given.model, config=config, trust_remote_code=True).eval()
        found = given.mask_id if given.mask_id is not None else getattr(config, "mask_token_id", None)
        if found is None:
            parser.error(f"{given.model} does not say its mask token; give --mask-id")
        mask_id = int(found)
    ids = torch.full((1, given.prompt + given.response), mask_id)
    ids[:, : given.prompt] = 1
    print(explain(model, ids, method=given.method, mask_id=mask_id))


def main() -> None:
    """Dispatch to a subcommand."""
    from . import bench, demo

    commands = {"demo": demo.main, "bench": bench.main, "explain": explain_main}
    if len(sys.argv) < 2 or sys.argv[1] not in commands:
        names = ", ".join(commands)
        sys.exit(f"usage: python -m dllm_compile COMMAND [OPTIONS]\ncommands: {names}; each has --help")
    commands[sys.argv[1]](sys.argv[2:])


if __name__ == "__main__":
    main()
