"""A window around the block whose rows are computed with it: their keys and values go on being fresh.

Of what a block cache leaves stale, the tokens beside the block matter most: those filled last, and those filled next.

    source                      rows of a partial step                             full steps
    dInfer, arXiv 2510.08666    ``rows_before`` before the block, the block, and   those of the cache, and the first
                                ``rows_behind`` behind it                          ``warmup_steps`` of a sequence
    DSB, arXiv 2602.05992       ``rows_before`` before a block that slides, or     those of the cache
                                as far as it has just moved where that is more
"""

from __future__ import annotations

import torch

from dllm_compile.interface.mechanism import Facts, Mechanism, Option, count


def around(rows: torch.Tensor, before: int, behind: int) -> torch.Tensor:
    """Positions ``[B, S]`` bool, ``before`` of them before the first of ``rows`` ``[B, S]`` and ``behind`` behind the
    last; none where there are no rows.
    """
    tokens = rows.shape[1]
    place = torch.arange(tokens)
    first = torch.where(rows, place, tokens).amin(1, keepdim=True)
    last = torch.where(rows, place, -1).amax(1, keepdim=True)
    near = ((place < first) & (place >= first - before)) | ((place > last) & (place <= last + behind))
    return near & (last >= 0)


def window(facts: Facts) -> torch.Tensor:
    """Rows ``[B, S]`` bool beside the active block."""
    options = facts.options
    return around(facts.blocks.active, options.rows_before or 0, options.rows_behind or 0)


def reach(facts: Facts) -> torch.Tensor:
    """Rows ``[B, S]`` bool that the window may come to before the next refresh: all behind a block that slides."""
    ahead = facts.blocks.active.long().cummax(1).values.bool()
    return ahead if facts.options.sliding is not None and facts.options.rows_behind else ahead & False


def warming(facts: Facts) -> torch.Tensor:
    """Sequences ``[B, 1]`` bool in their first steps."""
    return facts.blocks.calls <= (facts.options.warmup_steps or 0)


def _window(name: str, where: str) -> Option:
    return Option(
        name,
        None,
        **count("16", 0),
        meaning=f"rows {where} the block that partial steps compute with it, at least 0; ``None`` for none",
    )


MECHANISM = Mechanism(
    "vicinity",
    "dInfer, arXiv 2510.08666",
    options=(
        _window("rows_before", "before"),
        _window("rows_behind", "behind"),
        Option(
            "warmup_steps",
            None,
            **count("4", 0),
            meaning="full steps that a sequence begins with before the one whose keys are kept, at least 0; ``None`` "
            "for none",
        ),
    ),
    switches=("rows_before", "rows_behind", "warmup_steps"),
    widens=window,
    reach=reach,
    refresh=warming,
    neutral={"cache": "dual", "rows_before": 2, "rows_behind": 2, "refresh_interval": 1},
    methods={"dinfer": {"cache": "dual", "rows_before": 16, "rows_behind": 16, "warmup_steps": 4}},
    presets={"dinfer": {"method": "dinfer", "block_length": 64}},
)
