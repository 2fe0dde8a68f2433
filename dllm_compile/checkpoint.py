"""Load the model of a checkpoint, by transformers."""

from __future__ import annotations

import os
from typing import Any

OWN_CLASSES = "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel"


class NoCheckpoint(ValueError):
    """A name looks like a folder's, and there is none."""


def load(name: str, drawn: bool = False, is_causal: bool | None = None, dtype: Any = "auto", **code: Any) -> Any:
    """The model of a checkpoint that predicts tokens, in evaluation mode.

    Args:
        name: a folder with a ``config.json``, or ``OWNER/NAME`` on the hub.
        drawn: draw random weights; of the checkpoint only its configuration and its code are read.
        is_causal: in place of what its configuration says; ``None`` leaves that.
        dtype: of the weights; what the checkpoint says by default.
        code: ``trust_remote_code`` and ``revision``, of the configuration, the code and the weights.

    Raises:
        NoCheckpoint: there is no such folder.
        OSError, ValueError, ImportError, KeyError: transformers cannot load it.
    """
    import transformers

    if not os.path.isdir(name) and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise NoCheckpoint(f"{name!r} is no folder; give one with a config.json, or OWNER/NAME on the hub")
    config = transformers.AutoConfig.from_pretrained(name, **code)
    if is_causal is not None:
        config.is_causal = is_causal
    own = getattr(config, "auto_map", None) or {}
    kind = next((each for each in OWN_CLASSES if each in own), None)
    if kind is None:
        heads = " ".join(config.architectures or ())
        kind = "AutoModelForMaskedLM" if "MaskedLM" in heads else "AutoModelForCausalLM"
    loader = getattr(transformers, kind)
    if drawn:
        return loader.from_config(config, **code).eval()
    return loader.from_pretrained(name, config=config, dtype=dtype, **code).eval()
