"""The static form of sampling: it samples what the plain loop samples, for every family that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config, sampled_at_once
from rlhf_accel.models.static_cache import cannot_be_fixed
from rlhf_accel.rollout import decoding, padding
from rlhf_accel.rollout.decoding import StaticForm
from rlhf_accel.rollout.drawing import SamplingSettings
from rlhf_accel.rollout.engine import asks_for_static
from rlhf_accel.rollout.generations import Generations
from rlhf_accel.rollout.sampling import sample, uniforms
from rlhf_accel.system import graphs
from rlhf_accel.system.transfer import to_host_later
from tests.families import FAMILIES, PAD, tiny_config, tiny_model

ROWS, LENGTH = 4, 10
STOPS = list(range(40, 48))

# One of each kind of attention, position, cache and mask; a window holds 4 tokens (tests/families.py).
STATIC = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "olmo2", "stablelm", "granite", "cohere", "gpt2", "gpt_neox"),
    *("gptj", "opt", "xglm", "biogpt", "ctrl", "cohere2", "gemma2", "gemma3", "gpt_bigcode", "bloom", "mpt"),
    *("falcon alibi", "mixtral", "llama4_text", "gpt_oss", "deepseek_v3", "bert", "roberta"),
)
# Those that fall back, with the reason.
PLAIN = {
    "openai-gpt": "openai-gpt has no cache",
    "minimax": "minimax has a cache of its own, MiniMaxCache",
    "mamba": "mamba has a cache of LinearAttentionLayer",
    "qwen3_next": "qwen3_next has a cache of DynamicLayer, LinearAttentionLayer",
    "gemma3n_text": "gemma3n_text has a cache of DummyLayer, DynamicLayer, DynamicSlidingWindowLayer",
}

pytestmark = pytest.mark.usefixtures("exact_fp32")


class Messages(list[str]):
    """What a form logs."""

    def form(self, *, captures: bool = False) -> StaticForm:
        return StaticForm(graphs=captures, log=self.append)


def model_of(name: str) -> Any:
    return tiny_model(tiny_config(name.split()[0], **FAMILIES[name]))


@pytest.fixture(scope="module")
def llama() -> Any:
    return model_of("llama")


def at_stops(responses: Tensor) -> Tensor:
    return torch.isin(responses[:, -1], torch.tensor(STOPS))


def at(*places: int) -> Callable[[Tensor], Tensor]:
    """Row i ends with its token number places[i], counted from 1; whatever it is asked afterwards, all have ended."""
    return lambda responses: torch.tensor([responses.shape[1] >= place for place in places])


def sampled(model: Any, form: StaticForm | None, ended: Callable[[Tensor], Tensor] = at_stops, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(3, 40, (ROWS, 6), generator=generator)
    mask = torch.arange(6) >= torch.tensor([4, 0, 2, 1])[:, None]
    length = settings.pop("max_new_tokens", LENGTH)
    return sample(
        *(model, queries.masked_fill(~mask, PAD), mask, uniforms(0, 1, range(ROWS), length)),
        SamplingSettings(max_new_tokens=length, **settings),
        pad_id=PAD,
        stop_ids=STOPS,
        ended=ended,
        value=lambda states: states.sum(-1),
        static=form,
    )


def same(one: Generations, other: Generations) -> None:
    for name in ("responses", "response_mask", "finished"):
        assert getattr(one, name).equal(getattr(other, name)), name
    for name in ("logprobs", "entropy", "values"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STATIC)
def test_it_samples_what_the_plain_loop_samples(name: str) -> None:
    model, messages = model_of(name), Messages()
    for settings in ({"top_k": 1}, {"temperature": 0.8, "top_p": 0.95}):
        for ended in (at(3, 9, LENGTH, LENGTH + 1), at_stops):
            plain = sampled(model, None, ended, **settings)
            same(sampled(model, messages.form(), ended, **settings), plain)
            assert ended is at_stops or plain.response_mask.sum(1).tolist() == [3, 9, LENGTH, LENGTH]
    assert messages == []


@pytest.mark.parametrize("name", PLAIN)
def test_what_has_another_cache_falls_back_and_says_why_once(name: str) -> None:
    model, messages = model_of(name), Messages()
    form = messages.form()
    for _ in range(2):
        same(sampled(model, form), sampled(model, None))
    assert messages == [f"sampling without a static cache: {PLAIN[name]}"]


def test_attention_that_takes_no_mask_of_a_fixed_width_falls_back(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        cache = llama(input_ids=torch.tensor([[5, 6]])).past_key_values
    assert cannot_be_fixed(llama, cache) is None
    monkeypatch.setattr(llama.config, "_attn_implementation_internal", "flex_attention")
    assert (
        cannot_be_fixed(llama, cache) == "its attention is flex_attention, and only eager and sdpa read a fixed width"
    )


@pytest.mark.parametrize("window", [4, 24])
def test_the_probe_refuses_a_model_that_cuts_its_own_mask(window: int) -> None:
    """GPT-Neo's local attention counts from the end of the cache. Of a window that the probe's few tokens do not leave,
    that shows only in a cache as wide as the run's."""
    model = tiny_model(tiny_config("gpt_neo", **{**FAMILIES["gpt_neo"], "window_size": window}))
    batch = padding.made_up(torch.arange(3, 15), PAD)
    found = padding.static_problem(model, batch, PAD, torch.float32, Messages().form(), 30)
    assert found is not None and found.endswith("its cache does not continue a text as a pass reads it")


@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_the_probe_passes_others(name: str) -> None:
    batch = padding.made_up(torch.arange(3, 15), PAD)
    assert padding.static_problem(model_of(name), batch, PAD, torch.float32, Messages().form(), 30) is None


def test_the_probe_names_what_another_cache_is() -> None:
    batch = padding.made_up(torch.arange(3, 15), PAD)
    found = padding.static_problem(model_of("mamba"), batch, PAD, torch.float32, Messages().form(), 30)
    assert found == PLAIN["mamba"]


# When rows end, and leave


class Watched:
    """A model that notes how many rows it is given."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward, self.config, self.heights = model, model.forward, model.config, []
        self.get_output_embeddings = model.get_output_embeddings

    def __call__(self, **inputs: Any) -> Any:
        self.heights.append(len(inputs["input_ids"]))
        return self.model(**inputs)


def test_ended_rows_leave_at_set_lengths_if_few_are_left(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LEAVE_EVERY", 3)
    watched = Watched(llama)
    ended = at(2, 4, 9, 5)
    same(sampled(watched, Messages().form(), ended), sampled(llama, None, ended))
    # The end after token 5 is known when token 6 is on its way; one row is left then, of four.
    assert watched.heights == [4] * 6 + [1] * 4


def test_at_most_one_token_is_computed_too_many(llama: Any) -> None:
    watched = Watched(llama)
    found = sampled(watched, Messages().form(), at(2, 4, 3, 5))
    assert len(watched.heights) == 6 and found.response_mask.sum(1).tolist() == [2, 4, 3, 5]
    assert (found.responses[~found.response_mask] == PAD).all() and found.finished.all()


def test_stops_are_blocked_and_not_looked_for_before_min_new_tokens(llama: Any) -> None:
    asked: list[int] = []

    def ended(responses: Tensor) -> Tensor:
        asked.append(responses.shape[1])
        return at_stops(responses)

    settings = {"min_new_tokens": 6, "temperature": 3.0}
    found = sampled(llama, Messages().form(), ended, **settings)
    assert asked[0] == 6 and not torch.isin(found.responses[:, :6], torch.tensor(STOPS)).any()
    same(found, sampled(llama, None, **settings))
    assert int(found.finished.sum()) > 0 and min(found.response_mask.sum(1)) > 6


@pytest.mark.parametrize("length", [1, 2])
def test_a_response_of_one_or_two_tokens(llama: Any, length: int) -> None:
    same(*(sampled(llama, form, at(9, 9, 9, 9), max_new_tokens=length) for form in (Messages().form(), None)))


# Graphs, as far as they show without a GPU


def test_a_step_warms_up_is_captured_and_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def captured(step: Callable[[], None]) -> Callable[[], None]:
        done.append("captured")
        return lambda: done.append("replayed")

    monkeypatch.setattr(graphs, "warm_up", lambda step: done.append("warmed up"))
    monkeypatch.setattr(graphs, "captured", captured)
    running = graphs.runs(lambda: done.append("run"), capture=True, failed=done.append)
    for _ in range(3):
        next(running)
    assert done == ["warmed up", "captured", "replayed", "replayed"]


@pytest.mark.parametrize("where", ["warm_up", "captured"])
def test_a_step_that_cannot_be_captured_runs_as_it_is(llama: Any, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(step: Callable[[], None]) -> None:
        raise RuntimeError("operation not permitted when stream is\ncapturing")

    monkeypatch.setattr(graphs, "warm_up", lambda step: step())
    monkeypatch.setattr(graphs, where, refuses)
    messages = Messages()
    form = messages.form(captures=True)
    for _ in range(2):
        same(sampled(llama, form, at(9, 9, 9, 9)), sampled(llama, None, at(9, 9, 9, 9)))
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert messages == [f"sampling without CUDA graphs: none could be captured ({reason})"] and not form.graphs


def test_a_new_shape_and_the_end_of_blocking_take_a_new_graph(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "LEAVE_EVERY", 7)
    captures: list[int] = []

    def captured(step: Callable[[], None]) -> Callable[[], None]:
        captures.append(len(step.rows))
        return step

    monkeypatch.setattr(graphs, "warm_up", lambda step: step())
    monkeypatch.setattr(graphs, "captured", captured)
    ended = at(4, 5, 4, LENGTH + 1)
    same(
        sampled(llama, Messages().form(captures=True), ended, min_new_tokens=4),
        sampled(llama, None, ended, min_new_tokens=4),
    )
    assert captures == [4, 4, 1]


def test_tensors_of_a_step_stay_in_their_places(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph writes to the addresses that it was captured with."""
    places: list[list[int]] = []
    step = decoding.TokenStep.__call__

    def noted(self: decoding.TokenStep) -> None:
        tensors = [self.rows, self.t, self.column, self.tokens, self.mask, self.positions, *vars(self.out).values()]
        tensors += [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values, layer.column)]
        places.append([tensor.data_ptr() for tensor in tensors])
        step(self)

    monkeypatch.setattr(decoding.TokenStep, "__call__", noted)
    sampled(llama, Messages().form(), at(99, 99, 99, 99))
    assert len(places) == LENGTH - 1 and all(place == places[0] for place in places)


def test_a_copy_to_the_host_is_of_now() -> None:
    tensor = torch.zeros(2)
    later = to_host_later(tensor)
    tensor.add_(1)
    assert later().tolist() == [0, 0]


# Who samples so


@pytest.mark.parametrize(
    ("choice", "captures", "asked"),
    [("auto", True, True), ("auto", False, False), ("always", False, True), ("never", True, False)],
)
def test_the_config_decides(choice: str, captures: bool, asked: bool) -> None:
    rollout = parse(Config, {"rollout": {"static_cache": choice}}).rollout
    assert asks_for_static(rollout, StaticForm(graphs=captures)) == asked


@pytest.mark.parametrize(("size", "on_gpu", "most"), [(None, False, 64), (None, True, 49), (7, True, 7), (7, False, 7)])
def test_a_gpu_samples_its_share_at_once(size: int | None, on_gpu: bool, most: int) -> None:
    sections = {"rollout": {"batch_size": 49, "samples_per_prompt": 2}, "ppo": {"num_minibatches": 1}}
    rollout = replace(parse(Config, sections).rollout, forward_batch_size=size)
    assert sampled_at_once(rollout, 2, on_gpu=on_gpu) == most
