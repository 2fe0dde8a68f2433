"""A method of your own, in one file: a window that slides over the response.

    python examples/sliding_window.py --window 8

Between two refreshes a step computes the masked rows within ``window`` tokens of the first mask, and those that were
decided since the last refresh. Everything else is read from the cache. The rule knows nothing of the model, so it runs
on every model, under any loop, beside ``keep_ratio`` and ``saliency_threshold``.
"""

import argparse

import torch

import dllm_compile
from dllm_compile import Facts, Mechanism, Option, RowRule, tiny
from dllm_compile.interface.mechanism import count


def window(facts: Facts) -> torch.Tensor:
    """Rows of a step, ``[B, S]`` bool."""
    place = torch.arange(facts.masked.shape[1])
    first = torch.where(facts.masked, place, place.numel()).amin(1, keepdim=True)
    return (facts.masked & (place < first + facts.options.window)) | facts.since


def reach(facts: Facts) -> torch.Tensor:
    """Rows that the window may come to before the next refresh: their keys must not be evicted."""
    return facts.masked


SLIDING_WINDOW = dllm_compile.register(
    Mechanism(
        "sliding-window",
        "this file",
        options=(Option("window", 16, **count("16"), meaning="tokens behind the first mask that are computed"),),
        rules=(RowRule("sliding-window", window, "a window behind the first mask", reach=reach),),
        methods={"sliding-window": {"cache": "sliding-window", "refresh_interval": 8}},
        neutral={"cache": "sliding-window", "refresh_interval": 1},
    )
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--window", type=int, default=16)
    args = parser.parse_args()
    model, tokenizer = tiny.load()
    problem = tiny.problems(1, seed=3)[0]
    print("problem:", problem)
    prompt = tiny.encode([problem], tokenizer)
    ids = dllm_compile.generate(
        model, prompt, gen_length=tiny.RESPONSE_LENGTH, method="sliding-window", window=args.window
    )
    print("answer:", tokenizer.decode(ids[0, prompt.shape[1] :]))
    print(dllm_compile.stats(model))


if __name__ == "__main__":
    main()
