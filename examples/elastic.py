"""A method that measures each layer, in one file: deeper layers are recomputed where attention drifts.

    python examples/elastic.py --gamma 0.9

After Elastic-Cache (arXiv 2510.14973). Between two refreshes a step computes the first masked rows, those decided just
now, and the token that got most attention in each layer. Behind a layer the attention that this token gets from the
rows of the step is compared with what it got from them before; where the cosine is below ``gamma``, every layer behind
computes every row.
"""

import argparse

import torch

import dllm_compile
from dllm_compile import AfterLayer, Facts, Measured, Mechanism, Option, RowRule, attention_weights, tiny
from dllm_compile.interface.mechanism import count, is_number

UNKNOWN = -1.0
"""In place of the attention from a row that was not computed when it was noted."""


def rows(facts: Facts) -> torch.Tensor:
    """Rows of a step, ``[B, S]`` bool."""
    first = facts.masked & (facts.masked.cumsum(1) <= facts.options.beta)
    found = first | facts.call.filled
    for token, _ in facts.notes.values():
        found = found.scatter(1, token.cpu().unsqueeze(1), True)
    return found


def drift(measured: Measured) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor | None]:
    """Note the most-attended token of a layer, ``[B]``, and what it gets from each row, ``[B, S + 1]``.

    Returns:
        The note, and which sequences ``[B]`` bool have drifted from the note before.
    """
    places = measured.rows.clamp(max=measured.tokens)
    there = places < measured.tokens
    weights = torch.where(there.unsqueeze(2), measured.values, 0.0)  # [B, Q, S]
    drifted = None
    if measured.note is not None:
        token, before = measured.note
        now = weights.gather(2, token[:, None, None].expand(-1, places.shape[1], 1)).squeeze(2)
        old = before.gather(1, places).to(now.dtype)
        known = there & (old != UNKNOWN)
        similarity = torch.cosine_similarity(torch.where(known, now, 0.0), torch.where(known, old, 0.0), 1)
        drifted = known.any(1) & (similarity < measured.options.gamma)
    token = weights.sum(1).argmax(1)
    gets = weights.gather(2, token[:, None, None].expand(-1, places.shape[1], 1)).squeeze(2)
    noted = gets.new_full((len(gets), measured.tokens + 1), UNKNOWN).scatter(1, places, gets)
    noted[:, -1] = UNKNOWN
    return (token, noted), drifted


ELASTIC = dllm_compile.register(
    Mechanism(
        "elastic-cache",
        "arXiv 2510.14973, as far as this file says",
        options=(
            Option("beta", 16, **count("16"), meaning="masked rows, from the first, that a step computes"),
            Option(
                "gamma",
                0.9,
                lambda value: is_number(value) and -1 <= value <= 1.01,
                "a cosine, such as 0.9; more than 1 recomputes the layers behind the first at every step",
                "cosine of a layer's attention with its former self below which deeper layers compute every row",
            ),
        ),
        rules=(
            RowRule(
                "elastic",
                rows,
                "the first masks and the most-attended tokens",
                leaves_filled=True,
                after_layer=AfterLayer(attention_weights, drift),
            ),
        ),
        methods={"elastic-cache": {"cache": "elastic"}},
        neutral={"cache": "elastic", "refresh_interval": 1},
    )
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--beta", type=int, default=16)
    parser.add_argument("--gamma", type=float, default=0.9)
    args = parser.parse_args()
    model, tokenizer = tiny.load()
    problem = tiny.problems(1, seed=3)[0]
    print("problem:", problem)
    prompt, chosen = tiny.encode([problem], tokenizer), {"beta": args.beta, "gamma": args.gamma}
    ids = dllm_compile.generate(model, prompt, gen_length=tiny.RESPONSE_LENGTH, method="elastic-cache", **chosen)
    print("answer:", tokenizer.decode(ids[0, prompt.shape[1] :]))
    print(dllm_compile.stats(model))


if __name__ == "__main__":
    main()
