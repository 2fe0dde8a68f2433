"""``python -m dllm_compile models``: small random models of transformers under samplers, beside eager, as a table."""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import dllm_compile
from dllm_compile import checkpoint
from dllm_compile.interface.mechanism import nearest
from dllm_compile.opaque_modules import CALL_FAILS
from dllm_compile.quota_loop import quota_loop

from .command import Parser, require, target

ABOUT = "which models of transformers are cached under which sampling loops, beside eager, as a table"

VOCABULARY = 256
MASK = VOCABULARY - 1
TOKENS, PROMPT, CANVAS_LENGTH, EACH = 32, 16, 8, 4  # in all, of a prompt, of a canvas, and those that a step writes
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 128,
}  # fmt: skip
CAUSAL: dict[str, Any] = {
    **SMALL, "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 24, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "is_causal": False, "use_cache": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
"""A configuration of a class that is causal by default; names that it does not know are kept and mean nothing."""
MASKED: dict[str, Any] = {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"sliding_window": 8}
GROUPS = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
RELATIVE: dict[str, Any] = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "max_relative_positions": 16,
    "share_att_key": True, "norm_rel_ebd": "layer_norm",
}  # fmt: skip
CANVAS: dict[str, Any] = {
    "text_config": {
        **SMALL, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 24, "layer_types": ["sliding_attention", "full_attention"], **SLIDING,
    },
    "vision_config": {
        "model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    },
    "canvas_length": CANVAS_LENGTH, "boi_token_id": 3, "eoi_token_id": 4, "image_token_id": 5,
}  # fmt: skip

CLASSES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": CAUSAL,
    "MistralForCausalLM": {**CAUSAL, **SLIDING},
    "Qwen2ForCausalLM": CAUSAL,
    "Qwen3ForCausalLM": CAUSAL,
    "GemmaForCausalLM": CAUSAL,
    "Gemma2ForCausalLM": {**CAUSAL, **SLIDING},
    "Gemma3ForCausalLM": {**CAUSAL, **SLIDING, "layer_types": ["sliding_attention", "full_attention"]},
    "Phi3ForCausalLM": CAUSAL,
    "Olmo2ForCausalLM": CAUSAL,
    "Cohere2ForCausalLM": {**CAUSAL, **SLIDING},
    "Glm4ForCausalLM": CAUSAL,
    "SmolLM3ForCausalLM": CAUSAL,
    "GPT2LMHeadModel": CAUSAL,
    "GPTNeoXForCausalLM": CAUSAL,
    "Qwen3MoeForCausalLM": CAUSAL,
    "MixtralForCausalLM": CAUSAL,
    "OlmoeForCausalLM": CAUSAL,
    "GptOssForCausalLM": {**CAUSAL, **SLIDING},
    "DeepseekV3ForCausalLM": {**CAUSAL, **GROUPS, **LATENT, "num_key_value_heads": 4},
    "Qwen3NextForCausalLM": {
        **CAUSAL, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"],
    },
    "BertForMaskedLM": MASKED,
    "RobertaForMaskedLM": MASKED,
    "DistilBertForMaskedLM": {**MASKED, "hidden_dim": 48},
    "AlbertForMaskedLM": {**MASKED, "embedding_size": 16},
    "ElectraForMaskedLM": {**MASKED, "embedding_size": 16},
    "DebertaV2ForMaskedLM": {**MASKED, **RELATIVE},
    "ModernBertForMaskedLM": {**MASKED, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "EuroBertForMaskedLM": MASKED,
    "NomicBertForMaskedLM": MASKED,
    "EsmForMaskedLM": {**MASKED, "mask_token_id": MASK, "position_embedding_type": "rotary"},
    "FNetForMaskedLM": MASKED,
    "DiffusionGemmaForBlockDiffusion": CANVAS,
}  # fmt: skip
"""Rows of the table: a class of transformers, and its configuration."""

OPTIONS: dict[str, Any] = {"cache": "dual", "mask_id": MASK}
FAILS = (*CALL_FAILS, KeyError, ImportError, NotImplementedError)
COLUMNS = "model", "sampler", "cached layers", "dtype", "largest error", "tokens as eager", "remark"


@dataclass(frozen=True)
class Row:
    """What one model did under one sampler.

    A loop runs twice, in one block. Without a prompt a partial step computes every row, by code that is written for
    some: then what a sampler reads equals eager's. With a prompt it computes the response.

    Attributes:
        model: the name of the class, or of the folder.
        sampler: the name of the loop.
        cached: layers that read rows kept of an earlier step, in a partial step of each.
        layers: of the model.
        dtype: of the weights: float64, or float32 where the model computes in no other.
        error: largest difference of a logit that the loop may read from eager's, without a prompt; ``None`` where
            nothing was compiled, or the loop sees no logits.
        same: whether the tokens without a prompt were those of the loop in eager.
        remark: why graphs run on plain Inductor, or what failed.
    """

    model: str
    sampler: str
    cached: int = 0
    layers: int = 0
    dtype: str = ""
    error: float | None = None
    same: bool | None = None
    remark: str = ""

    def cells(self) -> tuple[str, ...]:
        """Texts of the columns."""
        of = f"{self.cached} of {self.layers}" if self.layers else ""
        error = "" if self.error is None else f"{self.error:.0e}" if self.error else "0"
        same = "" if self.same is None else "yes" if self.same else "**no**"
        return self.model, self.sampler, of, self.dtype, error, same, self.remark


class Beside(torch.nn.Module):
    """A model as a loop calls it. No sampler is offered the mask token, which these random models would write.

    Attributes:
        model: ``[B, S]`` ids to an output with ``logits``.
        options: of the backend; ``None`` calls the model in eager.
        compares: whether each call also runs in eager, and the logits of the masks are compared.
        error: the largest difference of a logit of a mask so far.
    """

    def __init__(self, model: torch.nn.Module, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.model, self.options, self.compares, self.error = model, options, options is not None, 0.0
        compiled: Any = model if options is None else torch.compile(model, backend="dllm", options=options)
        self.call: Callable[..., Any] = lambda ids, **more: compiled(ids, **more)  # no second child module

    @property
    def device(self) -> torch.device:
        """Of the weights; diffusers asks for it."""
        return next(self.model.parameters()).device

    def forward(self, ids: torch.Tensor, **more: Any) -> Any:
        """As the model; ``more`` is what else a loop hands it."""
        out = self.call(ids, **more)
        if self.compares:
            apart = (out.logits - self.model(ids, **more).logits)[ids == MASK].abs()
            self.error = max([self.error, *apart.max().reshape(-1).tolist()]) if apart.numel() else self.error
        out.logits = out.logits.index_fill(-1, torch.tensor([MASK]), -1e9)
        return out


# -- samplers ----------------------------------------------------------------------------------------------------------

Sampler = Callable[[Beside, torch.Tensor], torch.Tensor]
"""Fills ``TOKENS`` behind ids ``[1, P]`` and with them, by a model with its options, and returns all that it wrote."""


def own_loop(beside: Beside, prompt: torch.Tensor) -> torch.Tensor:
    """LLaDA's loop in plain PyTorch, as a user has it."""
    begin, response = prompt.shape[1], TOKENS - prompt.shape[1]
    x = torch.nn.functional.pad(prompt, (0, response), value=MASK)
    for _ in quota_loop(lambda ids: beside(ids).logits, x, begin, response, response, MASK, response // EACH):
        pass
    return x


def generate(beside: Beside, prompt: torch.Tensor) -> torch.Tensor:
    """``dllm_compile.generate``, whose step is compiled as a whole, and returns no logits. Places are drawn: rows of
    masks alone may be alike, and as sure up to rounding.
    """
    beside.error = math.nan
    response, draws = TOKENS - prompt.shape[1], torch.Generator().manual_seed(0)
    more = {"gen_length": response, "steps": response // EACH, "mask_id": MASK, **(beside.options or {})}
    return dllm_compile.generate(beside.model, prompt, remasking="random", generator=draws, **more)  # type: ignore[return-value]


def pipeline(beside: Beside, prompt: torch.Tensor) -> torch.Tensor:
    """diffusers' ``LLaDA2Pipeline``, which hands the model a mask and positions, too; in one block."""
    diffusers: Any = importlib.import_module("diffusers")
    pipe = diffusers.LLaDA2Pipeline(model=beside, scheduler=diffusers.BlockRefinementScheduler())
    pipe.set_progress_bar_config(disable=True)
    response = TOKENS - prompt.shape[1]
    out = pipe(
        input_ids=prompt, gen_length=response, block_length=response, num_inference_steps=response // EACH,
        temperature=0.0, sampling_method="greedy", threshold=2.0, editing_threshold=None, eos_early_stop=False,
        mask_token_id=MASK, output_type="seq",
    )  # fmt: skip
    return out.sequences  # type: ignore[no-any-return]


def canvas(beside: Beside, prompt: torch.Tensor) -> torch.Tensor:
    """The model's own ``generate``, which renoises with random tokens and knows no mask."""
    model: Any = beside.model
    if beside.options is not None:
        model.compile(backend="dllm", options=beside.options)
    beside.error = math.nan
    torch.manual_seed(0)
    found = model.generate(prompt, max_new_tokens=CANVAS_LENGTH, disable_compile=True)
    return getattr(found, "sequences", found)  # type: ignore[no-any-return]


SAMPLERS: dict[str, Sampler] = {"own loop": own_loop, "generate": generate, "LLaDA2Pipeline": pipeline}
OWN = "its own generate"


# -- models ------------------------------------------------------------------------------------------------------------


def build(name: str) -> torch.nn.Module:
    """A random model: of a class of transformers, or of a folder with a configuration, and code or weights.

    Weights are drawn wide, so that logits are far apart and attention is no average; those of a checkpoint are its own.
    """
    import transformers

    torch.manual_seed(0)
    if os.path.isdir(name):
        weights = any(each.endswith((".safetensors", ".bin")) for each in os.listdir(name))
        model: torch.nn.Module = checkpoint.load(name, drawn=not weights, trust_remote_code=True)
        if weights:
            return model
    else:
        made = getattr(transformers, name)
        model = made(made.config_class(**_settings(name)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def _settings(name: str) -> dict[str, Any]:
    """The configuration of a class, by its name where the table does not know it."""
    return CLASSES.get(name, MASKED if "MaskedLM" in name else CAUSAL)


def every_class() -> list[str]:
    """Classes of transformers that predict tokens, masked or causal."""
    from transformers.models.auto import modeling_auto as auto

    lists = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = [name for each in lists for name in each.values()]
    return [*dict.fromkeys(name if isinstance(name, str) else name[0] for name in found)]


def _precise(model: torch.nn.Module, prompt: torch.Tensor) -> torch.nn.Module:
    """The model in float64, or in float32 where it cannot be called in that."""
    try:
        model.double()(prompt)
    except CALL_FAILS:
        model.float()
    return model


def _mixes_backwards(model: torch.nn.Module, prompt: torch.Tensor) -> bool:
    """Whether the last token changes what the first row predicts."""
    other = prompt.clone()
    other[:, -1] += 1
    first, second = (model(ids).logits[:, 0] for ids in (prompt, other))
    return bool((first - second).abs().max() > 1e-5)


# -- the table ---------------------------------------------------------------------------------------------------------


def rows(name: str, samplers: Sequence[str], lowering: str) -> Iterator[Row]:
    """One row for each sampler.

    Args:
        name: of a class, or a folder.
        samplers: keys of ``SAMPLERS``.
        lowering: of the backend.
    """
    shown = os.path.basename(name.rstrip("/"))
    prompt = torch.randint(6, MASK - 1, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    own = CLASSES.get(name) is CANVAS
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(name)
            if not own:
                _precise(model, prompt)
                if not _mixes_backwards(model, prompt):
                    yield Row(shown, "", remark="is causal in every form that its configuration offers")
                    return
                dllm_compile.prepare(model, prompt)
        except FAILS as error:
            yield Row(shown, "", remark=f"not built: {_line(error)}")
            return
        for sampler in [OWN] if own else samplers:
            yield _row(shown, model, sampler, canvas if own else SAMPLERS[sampler], prompt, lowering)


def _row(name: str, model: Any, sampler: str, run: Sampler, prompt: torch.Tensor, lowering: str) -> Row:
    weight, nothing = next(model.parameters()), prompt if run is canvas else prompt[:, :0]
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", getattr(config, "n_layers", 0))
    row = partial(Row, name, sampler, layers=layers, dtype=str(weight.dtype).removeprefix("torch."))
    try:
        wanted = run(Beside(model), nothing)
    except FAILS as error:
        return row(remark=f"does not run in eager: {_line(error)}")
    try:
        with _fresh() as said:
            beside = Beside(model, {**OPTIONS, "lowering": lowering})
            with dllm_compile.loop():  # nothing shows it without a prompt
                got = run(beside, nothing)
            before, beside.compares = dllm_compile.stats(model), False
            run(beside, prompt)
            found = dllm_compile.stats(model)
    except FAILS as error:
        return row(remark=f"fails: {_line(error)}")
    cached = min(_cached(before), _cached(found, before))
    shown = None if math.isnan(beside.error) or not found["steps"] else beside.error
    return row(cached=cached, error=shown, same=torch.equal(got, wanted), remark=_remark(said, found))


def _cached(found: dict[str, Any], before: dict[str, Any] | None = None) -> int:
    """Layers a partial step that read rows kept of other steps, by counters now and ``before``."""
    steps = Counter(found["steps"]) - Counter(before["steps"] if before else {})
    layers = found["layers"]["cached"] - (before["layers"]["cached"] if before else 0)
    return int(layers // max(sum(n for kind, n in steps.items() if kind not in ("full", "exact", "repeat")), 1))


@contextlib.contextmanager
def _fresh() -> Iterator[list[str]]:
    """Nothing compiled before; the warnings of this package in the block."""
    torch.compiler.reset()
    dllm_compile.reset()
    gc.collect()  # sessions of the model whose counters would be added to those of the block
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(each.message) for each in caught if str(each.message).startswith("dllm")]


def _remark(said: Sequence[str], found: dict[str, Any]) -> str:
    """The first warning, or the first graph that was refused where no layer ran; without folders of this machine."""
    reasons = [*said, *([] if found["steps"] else found["refused"])]
    if reasons:
        return _tidy(reasons[0].removeprefix("dllm: "))
    if not found["compiled"]:
        return "not compiled: its `generate` calls its parts, not itself"
    return "" if found["layers"]["seen"] else "no layer is recognized, and every row is computed"


def _line(error: BaseException) -> str:
    """The first line of an error with its kind."""
    text = next((each for each in str(error).splitlines() if each.strip()), "")
    return _tidy(f"{type(error).__name__}: {text}")


def _tidy(text: str) -> str:
    """A text that fits into a cell: one line, no folder before a package, no sign that ends the cell."""
    text = re.sub(r"(/[^\s:'\"]*)?/site-packages/", "", " ".join(text.split()))
    return text.replace("|", "\\|")


def print_table(found: Sequence[Row]) -> str:
    """The rows in Markdown."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row.cells() for row in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"


def write(path: str, text: str) -> None:
    """Put the table between the two markers of a file.

    Raises:
        ValueError: it has no such markers.
    """
    with open(path, encoding="utf-8") as file:
        page = file.read()
    before, begin, rest = page.partition(BEGIN)
    _, end, behind = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n{text}\n{END}{behind}")


def main(argv: list[str]) -> None:
    """Print the table, a row as soon as it is known."""
    parser = Parser(prog="dllm_compile models", description=ABOUT)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--model", nargs="+", help="classes of transformers, or folders with a config.json, and code")
    chosen.add_argument("--all", action="store_true", help="every class of transformers that predicts tokens")
    parser.add_argument("--sampler", nargs="+", choices=[*SAMPLERS], help="loops; by default those that are installed")
    parser.add_argument("--lowering", choices=["eager", "inductor"], default="eager", help="of the backend; eager")
    parser.add_argument("--write", type=target, help="also put the table between the markers of this Markdown file")
    given = parser.parse_args(argv)
    require(parser, "demo", "transformers")
    import transformers

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for name in given.model or ():
        if not os.path.isdir(name) and not hasattr(transformers, name):
            near = nearest(name, CLASSES)
            parser.error(f"argument --model: {name!r} is no folder and no class of transformers; did you mean {near}?")
    samplers = given.sampler or [
        each for each in SAMPLERS if each != "LLaDA2Pipeline" or importlib.util.find_spec("diffusers") is not None
    ]
    found, begin = [], time.perf_counter()
    print(print_table([]), flush=True)
    for name in given.model or (every_class() if given.all else CLASSES):
        for row in rows(name, samplers, given.lowering):
            found.append(row)
            print(print_table([row]).splitlines()[-1], flush=True)
    spent = time.perf_counter() - begin
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{len(found)} rows in {spent:.0f} s; {versions}, lowering {given.lowering}", file=sys.stderr)
    if given.write:
        try:
            write(given.write, print_table(found))
        except ValueError as error:
            parser.error(str(error))
