"""``python -m dllm_compile demo | bench | explain | models | lm_eval``."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from . import checkpoint
from .bench.command import Parser, dispatch, leave, picture, require, target, whole

ABOUT = "what the compiler finds in a model, or the least time of a step of a published size on a GPU"
ABOUT_LM_EVAL = "lm-evaluation-harness, which then knows --model dllm; all words behind it are its own"
OF_A_MODEL, OF_A_SIZE = ("model", "mask_id", "prompt", "response", "picture", "html"), ("device", "length", "batch")
"""Flags of ``explain`` without ``--shape``, and with it."""


def explain_main(argv: list[str]) -> None:
    """``explain``: of the embedded model, of a local checkpoint that transformers can load, or of a published size."""
    import torch

    from . import tiny
    from .bench import floors, heat
    from .bench.model import SHAPES
    from .explain import explain
    from .options import Options
    from .page import page

    parser = _explain_parser([*floors.LAUNCHES], [*floors.GPUS])
    given = parser.parse_args(argv)
    for name in OF_A_MODEL if given.shape else OF_A_SIZE:
        if getattr(given, name) is not None:
            parser.error(f"--{name.replace('_', '-')} goes {'without' if given.shape else 'with'} --shape")
    require(parser, "demo", "transformers", "safetensors")
    if given.picture:
        require(parser, "plot", "matplotlib")
    method = given.method or "dllm-cache"
    try:
        Options(method=method)
    except ValueError as error:
        parser.error(f"argument --method: {error}")
    if given.shape:
        lengths, response = given.length or floors.LENGTHS, SHAPES[given.shape].response
        if min(lengths) <= response:
            parser.error(f"argument --length: {min(lengths)} tokens hold no prompt beside a response of {response}")
        floors.main(given.shape, given.device or "h100", lengths, given.batch or floors.BATCHES, given.method)
        return
    model = tiny.load()[0] if given.model is None else _checkpoint(parser, given.model)
    mask_id = given.mask_id if given.mask_id is not None else getattr(model.config, "mask_token_id", None)
    if mask_id is None:
        parser.error(f"{given.model} does not say its mask token; give --mask-id")
    prompt, response = given.prompt or tiny.PROMPT_LENGTH, given.response or tiny.RESPONSE_LENGTH
    ids = torch.full((1, prompt + response), int(mask_id))
    ids[:, :prompt] = 0 if mask_id == 1 else 1
    try:
        found = explain(model, ids, method=method, mask_id=int(mask_id))
    except ValueError as error:
        parser.error(str(error))
    _print(found)
    if not (given.picture or given.html):
        return
    seen = heat.ran(model, ids, int(mask_id), _block(response), {"method": method})
    if given.picture:
        heat.draw(seen, f"{method}: rows that each layer computes, {prompt} + {response} tokens", given.picture)
    if given.html:
        text = page(f"{method} on {type(model).__name__}, {prompt} + {response} tokens", found, seen)
        with open(given.html, "w", encoding="utf-8") as file:
            file.write(text)


def _print(found: Any) -> None:
    """Print what ``explain`` found: on a terminal with colours, where rich is installed."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
        import rich

        rich.print(found)
    else:
        print(found)


def _block(response: int) -> int:
    """Tokens of a block of the loop that is drawn: 32, or the most below that divide the response."""
    return next(length for length in range(min(32, response), 0, -1) if response % length == 0)


def _explain_parser(shapes: list[str], devices: list[str]) -> Parser:
    parser = Parser(prog="dllm_compile explain", description=ABOUT)
    parser.add_argument("--method", help="a method of the backend; dllm-cache by default, with --shape all of them")
    parser.add_argument("--model", help="folder or name of a checkpoint; the embedded model by default")
    parser.add_argument("--mask-id", type=whole(0), help="mask token; by default what the configuration says")
    parser.add_argument("--prompt", type=whole(), help="tokens of the prompt; by default as the embedded model's")
    parser.add_argument("--response", type=whole(), help="tokens of the response; likewise")
    parser.add_argument(
        "--picture", type=picture, help="also run a loop, and draw the rows that each layer computes to this PNG file"
    )
    parser.add_argument(
        "--html", type=target, help="also run a loop, and write all that is known to this file, as a page for a browser"
    )
    sizes = parser.add_argument_group("a model of a published size, without weights: the least time of a step on a GPU")
    sizes.add_argument("--shape", choices=shapes, help="whose size")
    sizes.add_argument("--device", choices=devices, help="h100 by default")
    sizes.add_argument("--length", nargs="+", type=whole(), help="tokens of prompt and response: 1024 4096 16384")
    sizes.add_argument("--batch", nargs="+", type=whole(), help="sequences run together: 1 8")
    return parser


def _checkpoint(parser: Parser, name: str) -> Any:
    """A model that transformers loads from a folder, or by the name of a repository."""
    try:
        return checkpoint.load(name, trust_remote_code=True)
    except checkpoint.NoCheckpoint as error:
        parser.error(f"argument --model: {error}")
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        parser.error(f"argument --model: transformers cannot load {name!r}: {reason}")


def lm_eval_main(argv: list[str]) -> None:
    """``lm_eval``: lm-evaluation-harness with ``--model dllm``, as it finds no models of other packages by itself."""
    require(Parser(prog="dllm_compile lm_eval"), "eval", "lm_eval", "transformers")
    from lm_eval.__main__ import cli_evaluate

    from . import evaluation  # noqa: F401  # it registers the model

    sys.argv = ["lm_eval", *argv]
    cli_evaluate()


def main(argv: list[str] | None = None) -> None:
    """Dispatch to a subcommand; ``argv`` are the words behind ``python -m dllm_compile``."""
    try:
        from .bench import bench, compatibility, demo

        commands = {
            "demo": (demo.main, demo.ABOUT),
            "bench": (bench.main, bench.ABOUT),
            "explain": (explain_main, ABOUT),
            "models": (compatibility.main, compatibility.ABOUT),
            "lm_eval": (lm_eval_main, ABOUT_LM_EVAL),
        }
        dispatch(commands, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        leave(130, "dllm_compile: interrupted")


if __name__ == "__main__":
    main()
