"""Sampling: what it samples, from which distribution, when it ends, and that nothing beside a sample changes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config

from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.models.positions import position_ids
from rlhf_accel.rollout import sampling as decoding
from rlhf_accel.rollout.drawing import SamplingSettings, pick, truncate
from rlhf_accel.rollout.generations import Generations
from rlhf_accel.rollout.sampling import sample, uniforms
from tests.conftest import TEXTS


class Counting:
    """A model that counts its calls and the columns that it was given."""

    def __init__(self, model: Any) -> None:
        self.model, self.forward, self.widths = model, model.forward, []

    def __call__(self, **inputs: Any) -> Any:
        self.widths.append(inputs["input_ids"].shape[1])
        return self.model(**inputs)


class Policy:
    """A tiny model with its tokenizer, sampled in one line."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokens = Tokens.load(str(folder))

    def prompts(self, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = self.tokens.encode([TEXTS[i % len(TEXTS)] for i in range(len(lengths))])
        return self.tokens.pad_left([row[:length] for row, length in zip(rows, lengths, strict=True)])

    def sample(
        self,
        queries: Tensor,
        mask: Tensor,
        uniform: Tensor,
        *,
        ended: Callable[[Tensor], Tensor] | None = None,
        stop_ids: Sequence[int] | None = None,
        model: Any = None,
        **settings: Any,
    ) -> Generations:
        stop = self.tokens.stop_condition(())
        return sample(
            model or self.model,
            queries,
            mask,
            uniform,
            SamplingSettings(max_new_tokens=uniform.shape[1], **settings),
            pad_id=self.tokens.pad_id,
            stop_ids=stop.ids if stop_ids is None else stop_ids,
            ended=ended or stop,
        )


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return Policy(request.getfixturevalue(f"{request.param}_folder"))


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> Policy:
    return Policy(gpt2_folder)


def never(responses: Tensor) -> Tensor:
    return torch.zeros(len(responses), dtype=torch.bool)


def ends_at(places: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Row i ends with its token number places[i], counted from 1."""
    return lambda responses: torch.tensor([responses.shape[1] == place for place in places])


# What is sampled


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}])
def test_the_greedy_limit_is_the_greedy_search_of_transformers(policy: Policy, settings: dict) -> None:
    queries, mask = policy.prompts([1, 7, 3, 12])
    ours = policy.sample(queries, mask, uniforms(0, 1, range(4), 16), ended=never, stop_ids=(), **settings)
    theirs = policy.model.generate(
        input_ids=queries, attention_mask=mask.long(), do_sample=False, max_new_tokens=16, min_new_tokens=16,
        eos_token_id=None, pad_token_id=policy.tokens.pad_id,
    )  # fmt: skip
    assert len(set(ours.responses.flatten().tolist())) > 8, "a policy that repeats itself would show little"
    assert ours.responses.tolist() == theirs[:, queries.shape[1] :].tolist()


def test_a_response_is_independent_of_its_batch_and_its_padding(policy: Policy) -> None:
    lengths = [1, 7, 3, 12, 5, 2]
    queries, mask = policy.prompts(lengths)
    uniform = uniforms(3, 5, range(6), 12)
    together = policy.sample(queries, mask, uniform, top_k=40, temperature=1.3)
    width = queries.shape[1]
    for i, length in enumerate(lengths):
        for padding in (0, 9):
            left = max(width - length - padding, 0) if padding else width - length
            row = torch.full((1, padding + length), policy.tokens.pad_id)
            row[:, padding:] = queries[i, width - length :]
            row_mask = torch.arange(padding + length)[None] >= padding
            alone = policy.sample(row, row_mask, uniform[i : i + 1], top_k=40, temperature=1.3)
            assert left >= 0
            assert alone.responses.tolist() == together.responses[i : i + 1].tolist()
            assert alone.response_mask.tolist() == together.response_mask[i : i + 1].tolist()
            torch.testing.assert_close(alone.logprobs, together.logprobs[i : i + 1], atol=1e-4, rtol=0)
    backwards = torch.arange(5, -1, -1)
    turned = policy.sample(queries[backwards], mask[backwards], uniform[backwards], top_k=40, temperature=1.3)
    assert turned.responses[backwards].tolist() == together.responses.tolist()


def test_what_padding_holds_does_not_matter(policy: Policy) -> None:
    queries, mask = policy.prompts([1, 9, 4])
    uniform = uniforms(0, 1, range(3), 8)
    other = queries.masked_fill(~mask, 17)
    assert policy.sample(queries, mask, uniform).responses.equal(policy.sample(other, mask, uniform).responses)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.5, "min_new_tokens": 4}])
def test_the_logprobs_are_those_of_a_full_forward(policy: Policy, settings: dict) -> None:
    queries, mask = policy.prompts([1, 7, 3, 12])
    uniform = uniforms(0, 1, range(4), 10)
    sampled = policy.sample(queries, mask, uniform, **settings)
    for i in range(4):
        query, response = queries[i][mask[i]], sampled.responses[i][sampled.response_mask[i]]
        with torch.no_grad():
            logits = policy.model(input_ids=torch.cat([query, response])[None]).logits[0]
        # Before top-k and top-p, and also where min_new_tokens forbade a token: the policy itself.
        said = (logits[len(query) - 1 : -1].double() / settings.get("temperature", 1.0)).log_softmax(-1)
        expected = said.gather(1, response[:, None])[:, 0].float()
        torch.testing.assert_close(sampled.logprobs[i, : len(response)], expected, atol=1e-4, rtol=0)
        assert not sampled.logprobs[i, len(response) :].any()
    assert sampled.logprobs.dtype == torch.float32


def test_the_cache_is_used(gpt2: Policy) -> None:
    queries, mask = gpt2.prompts([3, 5])
    model = Counting(gpt2.model)
    gpt2.sample(queries, mask, uniforms(0, 1, range(2), 6), model=model, ended=never)
    assert model.widths == [5, 1, 1, 1, 1, 1]


# When it ends


def test_the_mask_goes_up_to_and_including_the_stop_and_padding_follows(policy: Policy) -> None:
    queries, mask = policy.prompts([4, 4, 4])
    sampled = policy.sample(queries, mask, uniforms(0, 1, range(3), 6), ended=ends_at([1, 4, 7]), stop_ids=())
    assert sampled.response_mask.tolist() == [[True] + [False] * 5, [True] * 4 + [False] * 2, [True] * 6]
    assert sampled.finished.tolist() == [True, True, False]
    assert (sampled.responses[~sampled.response_mask] == policy.tokens.pad_id).all()
    assert not sampled.logprobs[~sampled.response_mask].any() and (sampled.logprobs[sampled.response_mask] < 0).all()


def test_other_rows_go_on_as_if_none_had_ended(policy: Policy) -> None:
    queries, mask = policy.prompts([4, 2, 6])
    uniform = uniforms(0, 1, range(3), 8)
    free = policy.sample(queries, mask, uniform, ended=never, stop_ids=())
    sampled = policy.sample(queries, mask, uniform, ended=ends_at([2, 9, 9]), stop_ids=())
    assert sampled.responses[1:].equal(free.responses[1:])
    assert sampled.responses[0, :2].equal(free.responses[0, :2])


def test_a_row_that_ended_does_not_end_again_or_count_again(gpt2: Policy) -> None:
    queries, mask = gpt2.prompts([4, 4])
    # PAD is EOS: after its end, row 0 is full of tokens that would end it.
    sampled = gpt2.sample(
        queries, mask, uniforms(0, 1, range(2), 5), stop_ids=(),
        ended=lambda r: torch.tensor([r.shape[1] == 2 or bool(r[0, -1] == gpt2.tokens.pad_id), False]),
    )  # fmt: skip
    assert sampled.response_mask.sum(1).tolist() == [2, 5]


def test_the_loop_ends_early_when_all_have_ended(gpt2: Policy) -> None:
    queries, mask = gpt2.prompts([3, 5, 2])
    model = Counting(gpt2.model)
    sampled = gpt2.sample(queries, mask, uniforms(0, 1, range(3), 20), model=model, ended=ends_at([2, 4, 1]))
    assert len(model.widths) == 4
    assert sampled.responses.shape == (3, 20)
    assert sampled.finished.all() and sampled.response_mask.sum(1).tolist() == [2, 4, 1]


@pytest.mark.parametrize(("place", "finished"), [(5, True), (6, False)])
def test_a_stop_exactly_at_the_length_limit_is_a_stop(gpt2: Policy, place: int, finished: bool) -> None:
    queries, mask = gpt2.prompts([3])
    sampled = gpt2.sample(queries, mask, uniforms(0, 1, [0], 5), ended=ends_at([place]))
    assert sampled.finished.tolist() == [finished]
    assert sampled.response_mask.all()


def test_one_new_token_and_a_batch_of_one(policy: Policy) -> None:
    queries, mask = policy.prompts([3, 8])
    uniform = uniforms(0, 1, range(2), 4)
    one = policy.sample(queries, mask, uniform[:, :1], ended=never)
    assert one.responses.shape == one.logprobs.shape == (2, 1) and one.response_mask.all()
    four = policy.sample(queries, mask, uniform, ended=never)
    assert one.responses.equal(four.responses[:, :1]), "a longer limit does not change what comes before"
    alone = policy.sample(queries[1:], mask[1:], uniform[1:], ended=never)
    assert alone.responses.equal(four.responses[1:])


def test_no_rows_need_no_model(gpt2: Policy) -> None:
    model = Counting(gpt2.model)
    empty = torch.zeros(0, 3, dtype=torch.int64)
    sampled = gpt2.sample(empty, empty.bool(), torch.zeros(0, 4), model=model)
    assert sampled.responses.shape == (0, 4) and model.widths == []


def test_stop_tokens_are_not_sampled_before_min_new_tokens(gpt2: Policy) -> None:
    queries, mask = gpt2.prompts([4] * 8)
    likely = gpt2.sample(queries, mask, uniforms(0, 1, range(8), 6), ended=never, stop_ids=(), top_k=2)
    stop_ids = sorted(set(likely.responses[:, 0].tolist()))  # what this policy likes to begin with
    stop = torch.tensor(stop_ids)

    def ended(responses: Tensor) -> Tensor:
        return torch.isin(responses[:, -1], stop)

    free = gpt2.sample(queries, mask, uniforms(0, 1, range(8), 6), ended=ended, stop_ids=stop_ids, top_k=2)
    assert free.response_mask.sum(1).tolist() == [1] * 8
    held = gpt2.sample(
        queries, mask, uniforms(0, 1, range(8), 6), ended=ended, stop_ids=stop_ids, top_k=2, min_new_tokens=3
    )
    assert not torch.isin(held.responses[:, :3], stop).any()
    # Before this many, not after: the fourth token may be a stop, and with this policy some are.
    lengths = held.response_mask.sum(1).tolist()
    assert min(lengths) == 4 and held.finished.any()
    # The logits are forbidden, not the probability that is reported of what was sampled.
    assert (held.logprobs[:, 0] < 0).all()


def test_a_stop_text_before_min_new_tokens_does_not_end_the_response(gpt2: Policy) -> None:
    queries, mask = gpt2.prompts([4])
    asked: list[int] = []

    def ended(responses: Tensor) -> Tensor:
        asked.append(responses.shape[1])
        return torch.ones(1, dtype=torch.bool)

    sampled = gpt2.sample(queries, mask, uniforms(0, 1, [0], 8), ended=ended, min_new_tokens=3)
    assert asked == [3] and sampled.response_mask.sum() == 3


# The distribution


def test_pick_follows_the_distribution() -> None:
    probabilities = torch.tensor([0.4, 0.0, 0.3, 0.05, 0.25, 0.0])
    draws = 20_000
    uniform = uniforms(7, 1, [0], draws)[0]
    counts = torch.bincount(pick(probabilities.expand(draws, 6), uniform), minlength=6).double()
    assert counts[1] == counts[5] == 0
    held = probabilities > 0
    expected = probabilities[held].double() * draws
    # Chi-square with 3 degrees of freedom: above 16.3 once in a thousand; the draws are fixed.
    assert float(((counts[held] - expected) ** 2 / expected).sum()) < 16.3


def test_pick_is_the_inverse_of_the_cumulated_probability() -> None:
    # Dyadic numbers, exact in fp32: a bound belongs to the token above it.
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(6, 3)
    uniform = torch.tensor([0.0, 0.2499999, 0.25, 0.7499999, 0.75, 1 - 2**-24])
    assert pick(logits.softmax(-1), uniform).tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, 1 - 2**-24])
@pytest.mark.parametrize("place", [0, 1, 49_999])
def test_the_only_possible_token_is_picked(uniform: float, place: int) -> None:
    logits = torch.full((1, 50_000), -torch.inf)
    logits[0, place] = 3.0
    assert pick(logits.softmax(-1), torch.tensor([uniform])).tolist() == [place]


def test_a_token_without_probability_is_never_picked() -> None:
    torch.manual_seed(0)
    logits = torch.randn(512, 1000) * 5
    logits[:, ::2] = -torch.inf  # also the first one
    logits[:, -3:] = -torch.inf  # and the last ones
    for uniform in (torch.zeros(512), torch.full((512,), 1 - 2**-24), torch.rand(512)):
        chosen = pick(logits.softmax(-1), uniform)
        assert logits.gather(1, chosen[:, None]).isfinite().all()


def test_a_token_without_probability_is_not_picked_where_the_sum_wavers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose parallel sum may add a bit where nothing is added."""
    logits = torch.tensor([[0.5, 0.0, 0.5]]).log()
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_: torch.tensor([[0.5, 0.5000001, 1.0]]))
    assert pick(logits.softmax(-1), torch.tensor([0.5])).item() in (0, 2)


def test_pick_goes_on_where_all_logits_are_low() -> None:
    assert pick(torch.tensor([[-1000.0, -1000.0]]).softmax(-1), torch.tensor([0.6])).tolist() == [1]


def test_the_sampled_tokens_follow_the_policy(gpt2: Policy) -> None:
    queries, mask = gpt2.prompts([5])
    rows = 4000
    sampled = gpt2.sample(
        queries.expand(rows, -1), mask.expand(rows, -1), uniforms(1, 1, range(rows), 1), ended=never, temperature=0.5
    )
    with torch.no_grad():
        expected = (gpt2.model(queries).logits[0, -1] / 0.5).softmax(-1)
    found = torch.bincount(sampled.responses[:, 0], minlength=len(expected)) / rows
    # Standard deviation of a frequency: at most sqrt(0.25 / 4000) = 0.008.
    assert (found - expected).abs().max() < 0.032
    assert 0.5 * (found - expected).abs().sum() < 0.1, "total variation"


def kept(logits: Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]


def test_top_k_keeps_the_likeliest_and_all_that_tie_with_the_last() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0], [4.0, 3.0, 2.0, 1.0]])
    assert kept(truncate(logits, 2, 1.0)) == [[1, 2, 3], [0, 1]]
    assert kept(truncate(logits, 1, 1.0)) == [[1], [0]]
    for all_of_them in (0, 4, 9):
        assert truncate(logits, all_of_them, 1.0).equal(logits)


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    cases = {1e-9: [1], 0.5: [1], 0.51: [0, 1], 0.75: [0, 1], 0.76: [0, 1, 2], 0.875: [0, 1, 2], 0.88: [0, 1, 2, 3]}
    for top_p, expected in cases.items():
        assert kept(truncate(logits, 0, top_p)) == [expected], top_p
    assert truncate(logits, 0, 1.0).equal(logits)


def test_top_p_is_taken_of_what_top_k_left() -> None:
    # Of 0.5 and 0.25 that top-k leaves, the first holds two thirds.
    logits = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    assert kept(truncate(logits, 2, 0.66)) == [[1]]
    assert kept(truncate(logits, 2, 0.67)) == [[0, 1]]


def test_truncation_changes_no_logit_that_it_keeps() -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 50)
    before = logits.clone()
    for top_k, top_p in ((5, 1.0), (0, 0.4), (20, 0.7)):
        cut = truncate(logits, top_k, top_p)
        assert logits.equal(before)
        assert cut[cut.isfinite()].equal(logits[cut.isfinite()])
        assert cut.argmax(1).equal(logits.argmax(1)), "the likeliest stays"


# The random numbers


def test_the_numbers_of_a_sample_depend_on_nothing_beside_it() -> None:
    whole = uniforms(3, 7, range(8), 16)
    assert whole.dtype == torch.float32 and whole.shape == (8, 16)
    assert whole.min() >= 0 and whole.max() < 1
    # Two processes, in whatever order, and a shorter limit.
    assert torch.cat([uniforms(3, 7, range(4), 16), uniforms(3, 7, range(4, 8), 16)]).equal(whole)
    assert uniforms(3, 7, [5, 2], 16).equal(whole[[5, 2]])
    assert uniforms(3, 7, range(8), 5).equal(whole[:, :5])
    assert uniforms(3, 7, [], 5).shape == (0, 5)


def test_seed_step_and_index_each_change_them() -> None:
    base = uniforms(0, 1, [2], 64)
    for other in (uniforms(1, 1, [2], 64), uniforms(0, 2, [2], 64), uniforms(0, 1, [3], 64), uniforms(1, 0, [2], 64)):
        assert (base != other).float().mean() > 0.9


def test_the_numbers_are_uniform() -> None:
    numbers = uniforms(0, 1, range(100), 100).flatten().double()
    # Of 10,000: standard deviation of the mean 0.0029, of a tenth's share 0.003.
    assert abs(float(numbers.mean()) - 0.5) < 0.012
    shares = torch.histc(numbers, 10, 0, 1) / len(numbers)
    assert (shares - 0.1).abs().max() < 0.012


def test_positions_count_real_tokens() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


# What is noted on the way


def test_entropy_and_values_are_those_of_a_full_forward(policy: Policy) -> None:
    queries, mask = policy.prompts([1, 7, 3, 12])
    stop = policy.tokens.stop_condition(())
    sampled = sample(
        policy.model, queries, mask, uniforms(0, 1, range(4), 10), SamplingSettings(max_new_tokens=10, temperature=0.8),
        pad_id=policy.tokens.pad_id, stop_ids=stop.ids, ended=ends_at([3, 10, 10, 6]),
        value=lambda hidden: hidden.sum(-1),
    )  # fmt: skip
    for i in range(4):
        query, response = queries[i][mask[i]], sampled.responses[i][sampled.response_mask[i]]
        with torch.no_grad():
            said = policy.model(input_ids=torch.cat([query, response])[None], output_hidden_states=True)
        logits = said.logits[0, len(query) - 1 : -1].double() / 0.8
        entropy = torch.distributions.Categorical(logits=logits).entropy().float()
        values = said.hidden_states[-1][0, len(query) - 1 : -1].sum(-1)
        torch.testing.assert_close(sampled.entropy[i, : len(response)], entropy, atol=1e-4, rtol=0)
        torch.testing.assert_close(sampled.values[i, : len(response)], values, atol=1e-3, rtol=0)
        assert not sampled.entropy[i, len(response) :].any() and not sampled.values[i, len(response) :].any()


def test_rows_that_ended_leave_the_batch(policy: Policy) -> None:
    """The model sees fewer rows as they end, and the others' responses stay what they were."""
    queries, mask = policy.prompts([4, 2, 6, 9])
    uniform = uniforms(0, 1, range(4), 8)
    heights: list[int] = []

    class Watched(Counting):
        def __call__(self, **inputs: Any) -> Any:
            heights.append(len(inputs["input_ids"]))
            return super().__call__(**inputs)

    free = policy.sample(queries, mask, uniform, ended=never, stop_ids=())
    places = [2, 5, 9, 3]
    watched = policy.sample(queries, mask, uniform, ended=ends_at(places), stop_ids=(), model=Watched(policy.model))
    assert heights == [4, 4, 3, 2, 2, 1, 1, 1]
    for i, place in enumerate(places):
        assert watched.responses[i, :place].equal(free.responses[i, :place])
        torch.testing.assert_close(watched.logprobs[i, :place], free.logprobs[i, :place], atol=1e-4, rtol=0)


def test_a_cache_that_cannot_let_rows_go_keeps_them(gpt2: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "has_plain_layers", lambda cache: False)
    queries, mask = gpt2.prompts([4, 2, 6])
    uniform = uniforms(0, 1, range(3), 6)
    free = gpt2.sample(queries, mask, uniform, ended=never, stop_ids=())
    kept = gpt2.sample(queries, mask, uniform, ended=ends_at([1, 2, 9]), stop_ids=())
    assert kept.responses[2].equal(free.responses[2])
    assert kept.response_mask.sum(1).tolist() == [1, 2, 6]


def test_rows_stay_where_layers_hold_more_than_keys_and_values() -> None:
    """Lfm2's convolutions keep a state for each row, which a cache cannot select."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Lfm2Config(
        vocab_size=99, num_hidden_layers=2, layer_types=["conv", "full_attention"], **shape, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    queries = torch.randint(3, 99, (3, 4))
    settings, places = SamplingSettings(max_new_tokens=6), [1, 2, 9]
    free, ended = (
        sample(
            model, queries, torch.ones_like(queries).bool(), uniforms(0, 1, range(3), 6), settings, pad_id=0, ended=by
        )
        for by in (never, ends_at(places))
    )
    assert ended.response_mask.sum(1).tolist() == [1, 2, 6]
    for i, place in enumerate(places):
        assert ended.responses[i, :place].equal(free.responses[i, :place])
