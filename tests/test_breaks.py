"""Models whose graph breaks: logging is left out where ``generate`` traces, and a line that breaks a graph is named."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import dllm_compile
from dllm_compile import denoise_step, generate, prepare
from dllm_compile.runtime.session import sessions

from . import models
from .test_layers_alone import Model
from .under_way import under_way

LOGGER = transformers.utils.logging.get_logger("transformers.stand_in")
PLAIN = logging.getLogger(__name__)
PROMPT, RESPONSE = 7, 8
OPTIONS: dict[str, Any] = {"lowering": "eager", "mask_id": models.MASK, "method": "exact"}


class Config:
    """A configuration with a property that was given up."""

    def __init__(self, say: Callable[[], None]) -> None:
        self.say = say

    @property
    def use_return_dict(self) -> bool:
        self.say()
        return True


class StandIn(Model):
    """Reads the property before anything else, or in the middle."""

    def __init__(self, say: Callable[[], None], where: str = "first") -> None:
        super().__init__()
        self.config, self.where = Config(say), where
        torch.nn.init.constant_(self.head.bias[models.MASK :], -99.0)  # it never chooses the mask, and so ends

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        bare = not self.config.use_return_dict if self.where == "first" else False
        logits = super().forward(ids, mask)
        return logits[:0] if bare else logits

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.where == "first" or self.config.use_return_dict else -x


def once() -> None:
    LOGGER.warning_once("`use_return_dict` is deprecated! Use `return_dict` instead!")


def plain() -> None:
    PLAIN.warning("deprecated")


def by_warnings() -> None:
    warnings.warn("deprecated", FutureWarning, stacklevel=2)


def failing() -> None:
    PLAIN.error("this one stays")


def line_of(function: Callable[[], None]) -> int:
    return function.__code__.co_firstlineno + 1


def build(say: Callable[[], None], where: str = "first") -> StandIn:
    with torch.no_grad():
        return StandIn(say, where).double().eval()


def ids() -> torch.Tensor:
    return models.start(PROMPT, RESPONSE)


@pytest.fixture(autouse=True)
def _settings_are_left_as_they_were() -> Any:
    before = torch._dynamo.config.ignore_logging_functions
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch._dynamo.config.ignore_logging_functions = before


def step(model: torch.nn.Module, calls: int = 3) -> None:
    """Some steps of a sampler that is compiled as a whole; the first tokens are filled whatever it chose."""
    run = torch.compile(denoise_step, backend="dllm", options=OPTIONS)
    x = ids()
    for i in range(calls):
        run(model, x, x == models.MASK, torch.tensor([1, 1]), 1, mask_id=models.MASK)
        x[:, PROMPT + i] = 5


def denoise(call: Callable[[torch.Tensor], Any]) -> None:
    x = ids()
    for i in range(3):
        call(x)
        x[:, PROMPT + i] = 5


@pytest.mark.parametrize("where", ["first", "middle"])
@pytest.mark.parametrize("say", [once, plain, by_warnings])
def test_generate_is_one_graph_though_the_model_logs(say: Callable[[], None], where: str) -> None:
    settings = torch._dynamo.config.ignore_logging_functions
    model = build(say, where)
    prompt = ids()[:, :PROMPT]
    more: dict[str, Any] = {"gen_length": RESPONSE, "mask_id": models.MASK}
    want = generate(model, prompt, **more)
    got = generate(model, prompt, method="exact", lowering="eager", **more)
    assert torch.equal(got, want)  # type: ignore[arg-type]
    session = under_way()
    assert all(models.VOCABULARY not in kept.shape for kept in session.kept.values())  # no logits: confidence alone
    assert dllm_compile.stats(model)["graphs_per_step"] == 1
    assert torch._dynamo.config.ignore_logging_functions == settings


@pytest.mark.parametrize("say", [once, plain])
def test_a_decision_that_is_cut_from_its_head_is_told_once(say: Callable[[], None]) -> None:
    model = build(say)
    with pytest.warns(UserWarning, match="cut the choice of tokens from the head") as told:
        step(model)
    assert len(told) == 1
    assert f"{__file__}:{line_of(say)}" in str(told[0].message)
    assert "prepare(model)" in str(told[0].message)
    assert dllm_compile.stats(model)["graphs_per_step"] == 2


def test_a_graph_that_breaks_inside_of_the_model_is_told_once() -> None:
    model = build(once, "middle")
    call = models.compiled_loop(model, method="exact")
    with pytest.warns(UserWarning, match="a graph broke at") as told:
        denoise(call)
    assert [f"{__file__}:{line_of(once)}" in str(each.message) for each in told] == [True]
    assert dllm_compile.stats(model)["graphs_per_step"] > 1


@pytest.mark.parametrize("where", ["first", "middle"])
@pytest.mark.parametrize("say", [once, plain])
def test_a_prepared_model_is_one_graph(say: Callable[[], None], where: str) -> None:
    model = build(say, where)
    assert prepare(model) is model
    step(model)
    assert dllm_compile.stats(model)["graphs_per_step"] == 1
    torch._dynamo.reset()
    for call in (models.compiled_loop(model, method="exact"), compiled_in_place(prepare(model))):
        x = ids()
        assert torch.allclose(call(x), model.forward(x))


def compiled_in_place(model: torch.nn.Module) -> torch.nn.Module:
    model.compile(backend="dllm", options=OPTIONS)
    return model


def test_a_prepared_model_still_breaks_where_an_error_is_logged() -> None:
    model = prepare(build(failing))
    with pytest.warns(UserWarning, match="cut the choice of tokens from the head"):
        step(model)


def test_preparing_takes_a_module_and_no_loggers_but_the_models() -> None:
    with pytest.raises(TypeError, match="not a function"):
        prepare(step)
    other = logging.getLogger("somebody_else")
    prepare(build(once))
    ignored = torch._dynamo.config.ignore_logging_functions
    assert PLAIN.warning in ignored
    assert other.warning not in ignored
    assert PLAIN.error not in ignored


def test_a_model_that_is_one_graph_behind_its_break_is_told_nothing() -> None:
    model = build(once)
    models.compiled_loop(model, method="exact")(ids())
    assert dllm_compile.stats(model)["graphs_per_step"] == 1


def test_a_break_elsewhere_is_not_blamed() -> None:
    """Layers that a user compiles one by one were not cut by any line."""

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(broken, backend="eager")(torch.ones(3))
    model = Model().double().eval()
    for layer in model.layers:
        layer.compile(backend="dllm", options=OPTIONS)
    model.embed.compile(backend="dllm", options=OPTIONS)
    denoise(model)
    assert sum(session.stats.graphs for session in sessions()) > 3


def test_a_generation_in_another_thread_leaves_settings_alone() -> None:
    seen = []
    model = build(plain)

    def work() -> None:
        generate(model, ids()[:, :PROMPT], gen_length=4, mask_id=models.MASK, method="exact", lowering="eager")
        seen.append(torch._dynamo.config.ignore_logging_functions)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [set()]
    assert dllm_compile.stats(model)["graphs_per_step"] == 1
