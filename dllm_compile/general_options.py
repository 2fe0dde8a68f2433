"""Options that belong to no mechanism."""

from __future__ import annotations

from .interface.mechanism import Option, count, flag, is_int, token_id

LOWERINGS = ("inductor", "eager")
READABLE = ("masked", "all")

GENERAL = (
    Option(
        "mask_id",
        None,
        token_id()["fits"],
        "the token id of the mask, such as 126336 for LLaDA",
        "token id of the mask; by default the id that ends the first call",
    ),
    Option(
        "shift",
        None,
        flag()["fits"],
        "True for samplers that read row i - 1 for token i, else False",
        "whether the sampler reads row ``i - 1`` for token ``i``, as Dream's does. ``None`` serves both kinds of "
        "samplers; ``True`` also counts the row before the response as part of it; ``False`` skips the rows before",
    ),
    Option(
        "readable",
        "masked",
        values=lambda: READABLE,
        meaning='rows whose logits are current: ``"masked"``, the masked ones and, unless ``shift`` is ``False``, the '
        'row before each; or ``"all"`` that a step computes, for samplers that read those of tokens they have filled',
    ),
    Option(
        "max_state_bytes",
        2**31,
        **count("2**31", 0),
        meaning="bytes that the sequences under way in a model may keep together; beyond them those used longest ago "
        "are dropped and begin anew at their next call. The one that is called always has its rows",
    ),
    Option(
        "verify",
        0,
        lambda v: is_int(v) and v >= 0,
        "a number of steps between checks, or 0 for none",
        "every so many steps the graph also runs without the method, in eager, and ``stats`` reports the difference; 0 "
        "never",
    ),
    Option(
        "cuda_graphs",
        False,
        **flag(),
        meaning="whether partial steps of a model that is one graph are recorded as CUDA graphs, where it is on CUDA; "
        '``mode="reduce-overhead"`` sets it. Rows that differ in number are then padded to multiples of 32',
    ),
    Option(
        "lowering",
        "inductor",
        values=lambda: LOWERINGS,
        meaning='``"inductor"``, or ``"eager"``, which runs the rewritten graphs uncompiled',
    ),
)
