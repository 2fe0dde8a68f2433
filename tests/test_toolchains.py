"""What users bring along: hooks that steer and record, adapters, exported code, offloaded weights, default backends."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import dllm_compile
from dllm_compile.backend import dllm

from . import models
from .callers import METHODS, NEUTRAL, PROMPT, RESPONSE, TOLERANCE, fill, off, readable, start, steps
from .grids import in_turn

WIDTH = models.SHAPE["hidden_size"]
LOSSY = {name: METHODS[name] for name in ("dllm-cache", "dual", "dyllm")}
EQUAL = {"neutral": NEUTRAL}
Call = Callable[[torch.Tensor], torch.Tensor]
Change = Callable[[int], None]


@pytest.fixture(autouse=True)
def _no_gradients_no_warnings() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="dllm")
        yield


def llama(layers: int = 2) -> torch.nn.Module:
    return models.build("llama", num_hidden_layers=layers)


def logits_of(call: Callable[..., Any]) -> Call:
    return lambda ids: call(input_ids=ids).logits  # type: ignore[no-any-return]


def walk(call: Call, change: Change = lambda step: None, seed: int = 1) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and logits of a greedy loop from left to right; ``change`` is told the number of each step before it."""
    x = start(seed=seed)
    for step in range(RESPONSE):
        change(step)
        logits = call(x).clone()
        yield x, logits
        x = fill(logits, x)


def worst(call: Call, plain: Call, change: Change = lambda step: None, seed: int = 1) -> list[float]:
    """How far from ``plain`` the readable rows of each step of a loop are."""
    return [off(got, plain(x), readable(x)) for x, got in walk(call, change, seed)]


# -- hooks that steer -------------------------------------------------------------------------------------------------


class Steered:
    """Adds a direction, times a strength that is a number or a tensor, to what the first layer makes."""

    def __init__(self, number: bool) -> None:
        self.number = number
        self.direction = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        self.strength: Any = None
        self.set(1.0)

    def set(self, strength: float) -> None:
        if self.number:
            self.strength = strength
        elif self.strength is None:
            self.strength = torch.tensor(strength, dtype=torch.float64)
        else:
            self.strength.fill_(strength)

    def __call__(self, module: torch.nn.Module, given: Any, made: Any) -> Any:
        return made + self.strength * self.direction


def steered(number: bool) -> tuple[torch.nn.Module, Steered]:
    model, hook = llama(), Steered(number)
    model.model.layers[0].register_forward_hook(hook)  # type: ignore[index,union-attr]
    return model, hook


@pytest.mark.shares_graphs
@pytest.mark.parametrize(("name", "number"), in_turn([*EQUAL, *LOSSY], [False, True]))
def test_a_strength_may_change_between_sequences_and_within_them(name: str, number: bool) -> None:
    """A method is what it is on a model that always had this strength; where it changes, every row is computed."""
    model, hook = steered(number)
    call, plain = logits_of(models.compiled_loop(model, **{**EQUAL, **LOSSY}[name])), logits_of(model)
    runs = {}
    for strength in (1.0, 2.0, 0.5):
        hook.set(strength)
        runs[strength] = [(x, got, plain(x)) for x, got in walk(call)]
    apart = [off(got, want, readable(x)) for run in runs.values() for x, got, want in run]
    assert (max(apart) < TOLERANCE) == (name in EQUAL)
    assert name in EQUAL or steps(model).keys() - {"full", "exact"}
    changed = worst(call, plain, lambda step: hook.set(1.0 if step < 3 else 3.0))
    assert changed[3] < TOLERANCE
    if name in LOSSY:
        alone, constant = steered(number)
        constant.set(0.5)
        fresh = logits_of(models.compiled_loop(alone, **LOSSY[name]))
        for (_, got, _), (_, want) in zip(runs[0.5], walk(fresh), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


# -- hooks that record ------------------------------------------------------------------------------------------------


def recorded(keep: Callable[[torch.Tensor], None]) -> torch.nn.Module:
    model = llama()
    model.model.layers[-1].register_forward_hook(lambda module, given, made: keep(made))  # type: ignore[index,union-attr]
    return model


def test_recorded_rows_are_those_that_the_step_computed_and_the_others_are_of_the_step_before() -> None:
    kept: dict[str, torch.Tensor] = {}
    right: dict[str, torch.Tensor] = {}
    model: Any = recorded(partial(kept.__setitem__, "made"))
    call = logits_of(models.compiled_loop(model, **METHODS["dual"]))
    plain = logits_of(recorded(partial(right.__setitem__, "made")))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step, (x, logits) in enumerate(walk(call)):
        plain(x)
        made, block = kept["made"], slice(PROMPT + step // 4 * 4, PROMPT + step // 4 * 4 + 4)
        if step % 4 == 0:  # a refresh, of all rows
            torch.testing.assert_close(made, right["made"], rtol=0, atol=TOLERANCE)
        else:
            assert torch.equal(made[:, : block.start - 1], seen[-1][0][:, : block.start - 1])
            assert torch.equal(made[:, block.stop :], seen[-1][0][:, block.stop :])
            assert not torch.equal(made[:, block], seen[-1][0][:, block])
        said = model.lm_head(model.model.norm(made))
        assert off(said[:, block], logits[:, block], readable(x)[:, block]) < TOLERANCE
        seen.append((made, made.clone()))
    assert all(torch.equal(made, copy) for made, copy in seen)  # later steps do not write to what was recorded


def test_recorded_rows_of_the_neutral_setting_are_eagers() -> None:
    kept: dict[str, torch.Tensor] = {}
    right: dict[str, torch.Tensor] = {}
    call = logits_of(models.compiled_loop(recorded(partial(kept.__setitem__, "made")), **NEUTRAL))
    plain = logits_of(recorded(partial(right.__setitem__, "made")))
    for x, _ in walk(call):
        plain(x)
        assert off(kept["made"], right["made"], readable(x)) < TOLERANCE


def test_a_list_that_grows_is_said_to_be_why_dynamo_stops() -> None:
    kept: list[torch.Tensor] = []
    model = recorded(kept.append)
    call = logits_of(models.compiled_loop(model, **METHODS["dual"]))
    with (
        torch._dynamo.config.patch(recompile_limit=3),
        pytest.warns(UserWarning, match=r"graph 3 of 3 .* for ids of 2 x 14 more than once: .* a list") as told,
    ):
        made = [*walk(call)]
    assert len([each for each in told if "dllm" in str(each.message)]) == 1
    assert len(kept) == RESPONSE == len(made)
    x, got = made[-1]  # in eager
    assert off(got, logits_of(model)(x), readable(x)) < TOLERANCE


# -- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.shares_graphs
@pytest.mark.parametrize("name", [*EQUAL, *LOSSY])
def test_adapters_may_be_switched_in_the_middle_of_a_sequence(name: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config, "one")
    model.add_adapter("two", config)
    model.double().eval()
    call, plain = logits_of(models.compiled_loop(model, **{**EQUAL, **LOSSY}[name])), logits_of(model)

    def change(step: int) -> None:
        if step in (0, 3):
            model.set_adapter("two" if step else "one")

    for seed in (1, 2):
        apart = worst(call, plain, change, seed)
        assert apart[0] < TOLERANCE
        assert apart[3] < TOLERANCE
        assert (max(apart) < TOLERANCE) == (name in EQUAL)
    assert dllm_compile.stats(model)["layers"]["cached"] or name == "neutral"


# -- a default backend, exported code, offloaded weights --------------------------------------------------------------


@pytest.fixture
def default() -> Iterator[Callable[[Any], None]]:
    yield torch.compiler.set_default_backend
    torch.compiler.set_default_backend(None)


def test_the_default_backend_may_be_this_one(default: Callable[[Any], None]) -> None:
    """By its name, and as a function that knows its options; who calls ``torch.compile`` names neither."""
    for backend, more, wanted in (
        ("dllm", {"options": {"lowering": "eager", "mask_id": models.MASK}}, {"full": 1, "response": 1, "select": 6}),
        (partial(dllm, options={"lowering": "eager", **METHODS["dual"]}), {}, {"full": 2, "block": 6}),
    ):
        torch._dynamo.reset()
        default(backend)
        model, declared = llama(), dllm_compile.loop()
        call = torch.compile(model, **more)
        with declared:
            apart = worst(logits_of(call), logits_of(model))
        assert apart[0] < TOLERANCE < max(apart)
        assert steps(model) == wanted


class Logits(torch.nn.Module):
    """A model that returns its logits alone."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids).logits  # type: ignore[no-any-return]


@pytest.mark.shares_graphs
@pytest.mark.parametrize("name", [*EQUAL, *LOSSY])
def test_an_exported_model_is_cached_as_the_model_is(name: str) -> None:
    model, options = llama(), {**EQUAL, **LOSSY}[name]
    exported = torch.export.export(Logits(llama()), (start(),)).module()
    call, own = models.compiled_loop(exported, **options), logits_of(models.compiled_loop(model, **options))
    for seed in (1, 2):
        for (x, got), (_, want) in zip(walk(call, seed=seed), walk(own, seed=seed), strict=True):
            assert off(got, want, readable(x)) < TOLERANCE
            assert name in LOSSY or off(got, exported(x), readable(x)) < TOLERANCE
    assert steps(exported) == steps(model)
    assert dllm_compile.stats(exported)["layers"] == dllm_compile.stats(model)["layers"]


def test_a_model_that_is_exported_for_any_length_is_cached() -> None:
    shapes = {"ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    exported = torch.export.export(Logits(llama()), (start(),), dynamic_shapes=shapes).module()
    call, plain = models.compiled_loop(exported, **METHODS["dual"]), logits_of(llama())
    for prompt in (PROMPT, PROMPT + 3):
        x = start(prompt=prompt)
        for step in range(3):
            got = call(x).clone()
            assert (off(got, plain(x), readable(x)) < TOLERANCE) == (step == 0)
            x = fill(got, x)
    assert steps(exported) == {"full": 2, "block": 4}


def test_an_exported_graph_that_cannot_be_cached_says_why() -> None:
    model = models.build("llama", num_hidden_layers=1, is_causal=True)
    exported = torch.export.export(Logits(model), (start(),)).module()
    with pytest.warns(UserWarning, match=r"runs on plain Inductor: .*causal"):
        assert max(worst(models.compiled_loop(exported, **METHODS["dual"]), logits_of(model))) < TOLERANCE


def test_attention_that_is_decomposed_into_several_calls_is_cached() -> None:
    decomposed = torch.export.export(Logits(llama(1)), (start(),)).run_decompositions().module()
    got = [logits.clone() for _, logits in walk(models.compiled_loop(decomposed, **METHODS["dual"]))]
    want = [logits.clone() for _, logits in walk(models.compiled_loop(Logits(llama(1)), **METHODS["dual"]))]
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < TOLERANCE
    assert steps(decomposed) == {"full": 2, "block": 6}


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights_give_full_steps_and_a_warning(where: str, tmp_path: Path) -> None:
    """And nothing is compiled behind the second call."""
    accelerate = pytest.importorskip("accelerate")
    model, plain = llama(1), llama(1)
    place = {"execution_device": torch.device("cpu")}
    if where == "cpu":
        accelerate.cpu_offload(model, **place)
    else:
        accelerate.disk_offload(model, str(tmp_path), **place)
    call = logits_of(models.compiled_loop(model, **METHODS["dual"]))
    graphs: list[int] = []

    def counted(ids: torch.Tensor) -> torch.Tensor:
        logits = call(ids)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return logits

    with pytest.warns(UserWarning, match=r"a graph broke at .*accelerate.hooks\.py") as told:
        assert max(worst(counted, logits_of(plain))) < TOLERANCE
    assert len([each for each in told if "dllm" in str(each.message)]) == 1
    assert graphs[1:] == graphs[1:2] * (RESPONSE - 1)


# -- FlexAttention ----------------------------------------------------------------------------------------------------


@pytest.mark.shares_graphs
@pytest.mark.parametrize(("name", "padded"), in_turn([*EQUAL, *LOSSY], [False, True]))
def test_flex_attention_is_cached_as_other_attention_is(name: str, padded: bool) -> None:
    model, other, options = llama(), llama(), {**EQUAL, **LOSSY}[name]
    model.config._attn_implementation = "flex_attention"  # type: ignore[union-attr]
    mask = torch.ones(2, PROMPT + RESPONSE, dtype=torch.long)
    mask[0, :2] = 0
    given = {"attention_mask": mask} if padded else {}
    flex, plain = (models.compiled_loop(each, **options) for each in (model, other))
    warnings.filterwarnings("ignore", message="dllm: a graph broke")  # where transformers makes the block mask
    runs = (walk(logits_of(partial(call, **given))) for call in (flex, plain))
    for (x, got), (_, want) in zip(*runs, strict=True):
        assert off(got, want, readable(x)) < TOLERANCE
        assert name in LOSSY or off(got, other(input_ids=x, **given).logits, readable(x)) < TOLERANCE
    assert steps(model) == steps(other)
    assert dllm_compile.stats(model)["layers"] == dllm_compile.stats(other)["layers"]


def test_flex_attention_of_any_length_is_cached() -> None:
    model, plain = llama(), logits_of(llama())
    model.config._attn_implementation = "flex_attention"  # type: ignore[union-attr]
    call = logits_of(models.compiled_loop(model, **METHODS["dual"]))
    warnings.filterwarnings("ignore", message="dllm: a graph broke")
    for prompt in (PROMPT, PROMPT + 3, PROMPT + 5):
        x = start(prompt=prompt)
        for step in range(3):
            got = call(x).clone()
            assert (off(got, plain(x), readable(x)) < TOLERANCE) == (step == 0)
            x = fill(got, x)
    assert steps(model) == {"full": 3, "block": 6}


class Masked(torch.nn.Module):
    """One layer whose two heads see what a mask allows, by FlexAttention or by a mask for each query and key."""

    def __init__(self, mask: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed, self.head = torch.nn.Embedding(models.VOCABULARY, 16), torch.nn.Linear(16, models.VOCABULARY)
        self.mix, self.mask = torch.nn.Linear(16, 48), mask
        self.double().eval()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.mix(x).chunk(3, -1))
        if isinstance(self.mask, torch.Tensor):
            seen = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        else:
            seen = flex_attention(q, k, v, block_mask=self.mask)
        return self.head(x + seen.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return ((i - j).abs() <= 3) | ((h == 1) & (j % 2 == 0)) | (j < 2 * b)


def blocks_alone() -> tuple[Any, torch.Tensor]:
    """A mask without a function: blocks of 4 see themselves, and the first sees the second."""
    which = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]], dtype=torch.int32)
    count = torch.tensor([2, 1, 1, 1], dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(count[None, None], which[None, None], BLOCK_SIZE=4, seq_lengths=(14, 14))
    block = torch.arange(14) // 4
    return mask, (block[:, None] == block) | ((block[:, None] == 0) & (block == 1))


def by_function() -> tuple[Any, torch.Tensor]:
    """A function of all four places, in blocks of 4: some are full, and some are hidden."""
    b, h, i, j = torch.meshgrid(*map(torch.arange, (2, 2, 14, 14)), indexing="ij")
    return create_block_mask(window, 2, 2, 14, 14, device="cpu", BLOCK_SIZE=4), window(b, h, i, j)


@pytest.mark.parametrize("made", [by_function, blocks_alone])
def test_a_block_mask_is_its_function_in_the_blocks_that_it_names(made: Callable[[], tuple[Any, Any]]) -> None:
    blocks, dense = made()
    assert not dense.all()
    model, plain = Masked(blocks), Masked(dense)
    assert max(worst(models.compiled_loop(model, **NEUTRAL), plain)) < TOLERANCE
    runs = (walk(models.compiled_loop(each, **METHODS["dyllm"])) for each in (model, plain))
    for (x, got), (_, want) in zip(*runs, strict=True):
        assert off(got, want, readable(x)) < TOLERANCE
    assert steps(model)["salient"] == 7


def test_a_mask_that_calls_what_nobody_follows_is_said_to_be_why_nothing_is_cached() -> None:
    mask = create_block_mask(lambda b, h, i, j: torch.sin(i - j) > -0.9, 2, 2, 14, 14, device="cpu")
    model = Masked(mask)
    with pytest.warns(UserWarning, match=r"mask of flex_attention calls sin.*attn_implementation") as told:
        assert max(worst(models.compiled_loop(model, **METHODS["dual"]), model)) < TOLERANCE
    assert len([each for each in told if "dllm" in str(each.message)]) == 1


def test_a_block_mask_that_the_graph_makes_is_said_to_be_why_nothing_is_cached() -> None:
    """As ``flex_attention`` does by itself where it gets none."""
    model = Masked(None)
    with pytest.warns(UserWarning, match="block mask of flex_attention is made in the graph: make it outside") as told:
        assert max(worst(models.compiled_loop(model, **METHODS["dual"]), model)) < TOLERANCE
    assert len([each for each in told if "dllm" in str(each.message)]) == 1


# -- rows that are no tokens ------------------------------------------------------------------------------------------

PATCHES, IMAGE_TOKEN = 8, 5


class Sees(torch.nn.Module):
    """A model of images ``[B, 8, 12]`` and text: the rows of the image come before the text, or, as in transformers, in
    place of tokens that stand for them.
    """

    def __init__(self, joins: bool) -> None:
        super().__init__()
        self.text, self.joins = llama(), joins
        torch.manual_seed(4)
        self.encoder = torch.nn.Linear(12, WIDTH).double()

    def rows(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        tokens = self.text.get_input_embeddings()(ids)  # type: ignore[operator]
        if self.joins:
            return torch.cat([self.encoder(image), tokens], 1)
        return tokens.masked_scatter((ids == IMAGE_TOKEN).unsqueeze(-1), self.encoder(image))  # type: ignore[no-any-return]

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.text(inputs_embeds=self.rows(ids, image)).logits[:, -len(ids[0]) :]  # type: ignore[no-any-return]


def image(seed: int) -> torch.Tensor:
    return torch.randn(2, PATCHES, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def surest(call: Call, ids: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and logits of a loop that fills the surest mask of each block of 4."""
    x = ids
    for step in range(RESPONSE):
        logits = call(x).clone()
        yield x, logits
        block = slice(-RESPONSE + step // 4 * 4, -RESPONSE + step // 4 * 4 + 4 or None)
        best = logits[..., : models.MASK].softmax(-1).max(-1)
        sure = torch.where(x == models.MASK, best.values, -1)[:, block]
        rows = torch.zeros_like(x, dtype=torch.bool)
        rows[:, block] = sure == sure.amax(1, keepdim=True)
        x = torch.where(rows, best.indices, x)


def with_embeddings(model: Sees, declared: bool, **options: Any) -> Callable[[int], Call]:
    """The model compiled behind its embeddings, by the seed of an image."""
    make = models.compiled_loop if declared else models.compiled
    text = make(model.text, **options)

    def call(seed: int) -> Call:
        return lambda ids: text(inputs_embeds=model.rows(ids, image(seed))).logits[:, -len(ids[0]) :]  # type: ignore[no-any-return]

    return call


@pytest.mark.shares_graphs
@pytest.mark.parametrize("name", [*EQUAL, *LOSSY])
def test_embeddings_of_images_and_text_are_cached_as_tokens_are(name: str) -> None:
    """Another image is another sequence; a model that gets the same rows by ids alone makes the same logits."""
    options = {**EQUAL, **LOSSY}[name]
    joined, scattered = Sees(joins=True), Sees(joins=False)
    embeds, ids = with_embeddings(joined, True, **options), models.compiled_loop(scattered, **options)
    for seed in (1, 2):
        apart = []
        longer = torch.cat([torch.full((2, PATCHES), IMAGE_TOKEN), start()], 1)
        runs = surest(embeds(seed), start()), surest(lambda x: ids(x, image(seed)), longer)  # noqa: B023
        for (x, got), (y, want) in zip(*runs, strict=True):
            assert torch.equal(x, y[:, PATCHES:])
            rows = readable(x)
            assert off(got, want[:, PATCHES:], rows) < TOLERANCE
            apart.append(off(got, joined(x, image(seed)), rows))
        assert apart[0] < TOLERANCE
        assert (max(apart) < TOLERANCE) == (name in EQUAL)
    assert steps(joined.text) == steps(scattered)
    assert name in EQUAL or steps(joined.text).keys() - {"full", "exact"}


def test_a_loop_over_embeddings_that_nobody_declared_is_found_after_four_calls() -> None:
    model = Sees(joins=True)
    call = with_embeddings(model, False, **METHODS["dyllm"])(1)
    apart = [off(got, model(x, image(1)), readable(x)) for x, got in surest(call, start())]
    assert max(apart[:5]) < TOLERANCE < min(apart[5:])


def test_rows_that_are_joined_inside_of_the_graph_are_said_to_be_why_nothing_is_cached() -> None:
    model = Sees(joins=True)
    call = models.compiled_loop(model, **METHODS["dual"])
    with pytest.warns(UserWarning, match=r"joined to others here.*inputs_embeds.*\(cat\)") as told:
        run = [*surest(lambda ids: call(ids, image(1)), start())]
    assert max(off(got, model(x, image(1)), readable(x)) for x, got in run) < TOLERANCE
    assert len([each for each in told if "dllm" in str(each.message)]) == 1


def diffusion_gemma() -> Any:
    """A small DiffusionGemma: an encoder whose keys the decoder reads, beside those of a canvas of 8 random tokens."""
    made = pytest.importorskip("transformers.models.diffusion_gemma")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, **heads}
    text = {**sizes, "vocab_size": models.VOCABULARY, "layer_types": ["full_attention"], "global_head_dim": 8}
    text |= {"num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 8, "max_position_embeddings": 64}
    special = {"image_token_id": 60, "boi_token_id": 58, "eoi_token_id": 59}
    config = made.configuration_diffusion_gemma.DiffusionGemmaConfig(
        text_config=text, vision_config=sizes, canvas_length=8, **special
    )
    torch.manual_seed(0)
    model = made.modeling_diffusion_gemma.DiffusionGemmaForBlockDiffusion(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.25) if weight.dim() > 1 else None
    return model.eval()


def test_diffusion_gemma_compiles_itself_with_this_backend_and_a_warning(default: Callable[[Any], None]) -> None:
    """There are no masks, so no method applies: it runs as Inductor runs it, and says so."""
    model, ids = diffusion_gemma(), start(prompt=6, response=0)

    def generated(**more: Any) -> torch.Tensor:
        torch.manual_seed(7)
        found = model.generate(ids, max_new_tokens=16, max_denoising_steps=3, eos_token_id=None, **more)
        return found.sequences  # type: ignore[no-any-return]

    want = generated(disable_compile=True)
    default(partial(dllm, options={"lowering": "eager"}))
    with pytest.warns(UserWarning, match="dllm: .* plain Inductor"):
        assert torch.equal(generated(cache_implementation="static"), want)
    assert hasattr(model, "_compiled_decoder_forward")
    assert not steps(model)
