"""As many tokens a step as are likely right together: the Fréchet profile of Fast-dLLM++ (arXiv 2606.02955, its code).

With the candidates of a sequence ordered by confidence, ``c(1) >= c(2) >= ...``, the ``n`` surest are written for the
largest ``n`` with

    score(n) = sum over j <= n of c(j)  -  (n - 1)  -  (1 - c(n))  >  delta

The first two terms are the least that the probability of all ``n`` being right can be (Fréchet's bound), the last is
the slack of the least sure. Of equal confidences this is Fast-dLLM's factor rule with ``f = 1 - delta``.
"""

from __future__ import annotations

import torch

from dllm_compile.interface.mechanism import Confidences, Mechanism, Option, is_number


def jointly_likely(told: Confidences) -> torch.Tensor:
    """The candidates ``[B, S]`` bool of the largest ``n`` above; the score never rises with ``n``."""
    ordered, order = told.sure.double().sort(-1, descending=True)
    before = torch.arange(ordered.shape[-1], device=ordered.device)
    score = ordered.cumsum(-1) - before - (1 - ordered)
    return torch.zeros_like(told.candidates).scatter(-1, order, score > told.options.frechet_delta)


MECHANISM = Mechanism(
    "frechet-profile",
    "Fast-dLLM++, arXiv 2606.02955",
    options=(
        Option(
            "frechet_delta",
            None,
            fits=lambda v: is_number(v) and 0 <= v < 1,
            wanted="a probability, such as 0.25, from 0 and below 1",
            meaning="``generate`` writes the surest tokens that are right together with more than this probability, "
            "at least, less the slack of the last one; in place of ``threshold`` and ``factor``",
        ),
    ),
    switches=("frechet_delta",),
    unmask=jointly_likely,
    presets={"fast-dllm++": {"method": "fast-dllm", "cache": "dual", "frechet_delta": 0.25}},
)
