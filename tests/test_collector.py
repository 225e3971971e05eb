"""Sampling and forward passes: a response depends on seed, step and row alone, and the models judge it as they are."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from rlhf_accel.config.schema import RolloutConfig
from rlhf_accel.data import prompts as data
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models.policy import load_policy
from rlhf_accel.models.policy_with_value import build
from rlhf_accel.models.reference import load_reference
from rlhf_accel.reward import Reward
from rlhf_accel.rollout.collector import Collector
from rlhf_accel.rollout.decoding import StaticForm
from rlhf_accel.rollout.engine import BuiltinEngine, Seeds, sampling_settings
from rlhf_accel.rollout.scoring import FailedScoring, score, score_parts
from rlhf_accel.training.nonfinite import rollout_fault

pytestmark = pytest.mark.usefixtures("exact_fp32")

PROMPTS = ["The film", "A", "It is long, it is slow", "Bad acting", "An odd little film"]
LETTERS = ["e", "t", "a", "i"]  # stop texts that a random model soon writes


@pytest.fixture
def collector_of(tiny):
    """A function that makes a collector of a tiny model."""

    def make(*, critic=True, **sections):
        config = tiny(**sections)
        runtime, tokens = Runtime(config.run), Tokens.load(config.model.name_or_path)
        policy = load_policy(config, config.model.name_or_path, runtime.device)
        reference = load_reference(config, policy)
        module = build(config, policy, config.model.name_or_path, None, critic=critic)
        runtime.prepare(module, torch.optim.AdamW(module.parameters()))
        kept = config.rollout.logprobs == "sampled"
        fast, with_values = config.run.fast_kernels, kept and critic and module.critic_reads_policy
        engine = BuiltinEngine(
            runtime=runtime, tokens=tokens, with_values=with_values, static=StaticForm(graphs=False), fast_kernels=fast
        )
        return Collector(
            config=config.rollout,
            runtime=runtime,
            tokens=tokens,
            engine=engine,
            reference=reference,
            pass_tokens=config.ppo.micro_batch_tokens,
            recompute=not kept,
        )

    return make


def prompts_for(collector, columns=None):
    return data.prompt_batch(collector.tokens.encode(PROMPTS), collector.tokens, columns)


def rolled_out(collector, seed=0, step=1):
    prompts = prompts_for(collector)
    responses = collector.sample(prompts, Seeds(seed, step))
    nothing = torch.zeros(responses.sequences.responses.shape)
    return collector.forward(prompts, responses, torch.arange(5.0), nothing)


def logprobs_one_by_one(policy, rollout, temperature):
    """Each row alone, unpadded, through plain transformers."""
    rows = []
    sequences = rollout.sequences
    for i in range(len(rollout)):
        query = sequences.queries[i][sequences.query_mask[i]]
        response = sequences.responses[i][sequences.response_mask[i]]
        with torch.no_grad():
            logits = policy(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        rows.append((logits / temperature).log_softmax(-1)[torch.arange(len(response)), response])
    return rows


def assert_rows(matrix, rows, mask):
    for i, row in enumerate(rows):
        assert_close(matrix[i][mask[i]], row, atol=1e-5, rtol=1e-5)


def test_sampling_follows_seed_and_step_alone(collector_of):
    collector = collector_of(rollout={"stop": LETTERS})
    first = collector.sample(prompts_for(collector), Seeds(0, 1))
    torch.rand(3)
    again = collector.sample(prompts_for(collector), Seeds(0, 1))
    assert torch.equal(again.sequences.responses, first.sequences.responses)
    assert torch.equal(again.sequences.response_mask, first.sequences.response_mask)
    for seed, step in ((1, 1), (0, 2)):
        other = collector.sample(prompts_for(collector), Seeds(seed, step))
        assert not torch.equal(other.sequences.responses, first.sequences.responses)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_how_many_rows_go_through_at_once_does_not_matter(collector_of, size):
    whole = rolled_out(collector_of(rollout={"stop": LETTERS}))
    parts = rolled_out(collector_of(rollout={"stop": LETTERS, "forward_batch_size": size}))
    mask = whole.sequences.response_mask
    assert 5 < mask.sum() < mask.numel(), "rows of all lengths make this a test"
    assert torch.equal(parts.sequences.responses, whole.sequences.responses)
    assert torch.equal(parts.sequences.response_mask, mask)
    assert torch.equal(parts.finished, whole.finished)
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        assert_close(getattr(parts, name)[mask], getattr(whole, name)[mask], atol=1e-5, rtol=1e-5)
    assert parts.texts == whole.texts


def test_a_row_keeps_its_response_in_another_company(collector_of):
    collector = collector_of()
    prompts = prompts_for(collector)
    whole = collector.sample(prompts, Seeds(0, 1))
    rows = torch.tensor([3, 1])
    few = collector.sample(prompts.select(rows), Seeds(0, 1))
    assert torch.equal(few.sequences.responses, whole.sequences.responses[rows])


@pytest.mark.parametrize(
    ("lora", "rollout"),
    [({}, {}), ({}, {"temperature": 0.7}), ({}, {"top_k": 5}), ({}, {"top_p": 0.5}), ({"r": 4}, {"temperature": 1.3})],
)
def test_forward_agrees_with_plain_transformers(collector_of, gpt2_folder, lora, rollout):
    """Also under top-k and top-p: what learns is the policy as a whole, not the part of it that was sampled from."""
    collector = collector_of(lora=lora, rollout={"stop": LETTERS, **rollout})
    rollout = rolled_out(collector)
    mask = rollout.sequences.response_mask
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    rows = logprobs_one_by_one(plain, rollout, collector.config.temperature)
    assert_rows(rollout.logprobs, rows, mask)
    assert_rows(rollout.ref_logprobs, rows, mask)
    # Before any learning the two are one model: not about, but exactly.
    assert torch.equal(rollout.logprobs[mask], rollout.ref_logprobs[mask])
    assert torch.equal(rollout.values, torch.zeros_like(rollout.values))


@pytest.mark.parametrize("lora", [{}, {"r": 4}])
def test_the_reference_stays_when_the_policy_moves(collector_of, gpt2_folder, lora):
    collector = collector_of(lora=lora)
    module = collector.runtime.plain_module
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    rollout = rolled_out(collector)
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    assert_rows(rollout.ref_logprobs, logprobs_one_by_one(plain, rollout, 1.0), rollout.sequences.response_mask)
    assert_rows(rollout.logprobs, logprobs_one_by_one(module.policy, rollout, 1.0), rollout.sequences.response_mask)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.1
    assert rollout.values.abs().max() > 0.01


def test_masks_end_with_the_stop_and_texts_are_what_was_sampled(collector_of):
    collector = collector_of(rollout={"stop": LETTERS})
    responses = collector.sample(prompts_for(collector), Seeds(0, 1))
    assert responses.prompts == tuple(PROMPTS)
    assert responses.finished.any()
    assert not responses.finished.all()
    for i, text in enumerate(responses.texts):
        mask = responses.sequences.response_mask[i]
        length = int(mask.sum())
        assert torch.equal(mask, torch.arange(len(mask)) < length)
        sampled = responses.sequences.responses[i, :length].tolist()
        assert text == collector.tokens.text(collector.tokens.encode([PROMPTS[i]])[0] + sampled)[len(PROMPTS[i]) :]
        holds_stop = any(letter in text for letter in LETTERS)
        assert bool(responses.finished[i]) == holds_stop
        assert holds_stop or length == collector.config.max_new_tokens
        before = collector.tokens.text(sampled[:-1])
        assert not any(letter in before for letter in LETTERS), "a token after the stop counts"


def test_an_end_of_text_token_ends_a_response_and_counts(collector_of):
    collector = collector_of()
    policy = collector.runtime.plain_module.policy
    # A vocabulary layer that always says "end of text", whose id is also the padding's.
    eos = policy.config.eos_token_id
    handle = policy.lm_head.register_forward_hook(
        lambda _, inputs, logits: torch.zeros_like(logits).index_fill(-1, torch.tensor([eos]), 50.0)
    )
    try:
        responses = collector.sample(prompts_for(collector), Seeds(0, 1))
    finally:
        handle.remove()
    assert collector.tokens.pad_id == eos
    assert responses.sequences.response_mask.sum(1).tolist() == [1] * 5
    assert responses.finished.all()
    assert responses.texts == ("",) * 5


def test_rewards_read_prompts_responses_and_columns(collector_of):
    collector, seen = collector_of(), {}

    def reward(prompts, responses, number):
        seen.update(prompts=prompts, responses=responses)
        return [2.0 * n for n in number]

    responses = collector.sample(prompts_for(collector, {"number": [1, 2, 3, 4, 5]}), Seeds(0, 1))
    scores = score(collector.runtime, responses, Reward(terms=(("reward", 1.0, reward),)))
    assert scores.tolist() == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert seen == {"prompts": PROMPTS, "responses": list(responses.texts)}
    partial_scores = torch.rand(responses.sequences.responses.shape)
    rollout = collector.forward(prompts_for(collector), responses, scores, partial_scores)
    assert rollout.partial_scores.equal(partial_scores)
    assert rollout.scores.tolist() == scores.tolist()
    assert (rollout.prompts, rollout.texts) == (responses.prompts, responses.texts)


def parts_of(collector, responses, row, every):
    """The text of the response before each of its tokens, as read every so many."""
    prompt = collector.tokens.encode([PROMPTS[row]])[0]
    ids = responses.sequences.responses[row][responses.sequences.response_mask[row]].tolist()
    return [collector.tokens.text(prompt + ids[: t - t % every])[len(PROMPTS[row]) :] for t in range(len(ids))]


def test_partial_scores_are_those_of_the_response_before_each_token(collector_of):
    collector = collector_of(rollout={"stop": LETTERS, "max_new_tokens": 12})
    responses = collector.sample(prompts_for(collector, {"number": [1, 2, 3, 4, 5]}), Seeds(0, 1))
    lengths = responses.sequences.response_mask.sum(1).tolist()
    assert min(lengths) <= 6 < max(lengths), "not all have a third part"
    read = []

    def reward(prompts, texts, number):
        read.extend(prompts)
        return [100.0 * n + len(text) for text, n in zip(texts, number, strict=True)]

    scores = score_parts(collector.runtime, collector.tokens, responses, Reward(terms=(("reward", 1.0, reward),)), 3)
    for i, length in enumerate(lengths):
        expected = [100.0 * (i + 1) + len(text) for text in parts_of(collector, responses, i, 3)]
        assert scores[i, :length].tolist() == expected
    assert len(read) == sum(math.ceil(length / 3) for length in lengths), "no part is read that no token follows"
    assert set(read) == set(PROMPTS)
    assert not score_parts(collector.runtime, collector.tokens, responses, Reward(terms=()), 0).any(), (
        "for 0 no reward is asked"
    )


def test_parts_are_calibrated_and_clipped_as_whole_responses_are(collector_of):
    collector = collector_of(rollout={"max_new_tokens": 6})
    responses = collector.sample(prompts_for(collector), Seeds(0, 1))

    def reward(prompts, texts):
        return [float(len(text)) for text in texts]

    plain = Reward(terms=(("reward", 1.0, reward),))
    lengths = score_parts(collector.runtime, collector.tokens, responses, plain, 1)
    scores = score_parts(collector.runtime, collector.tokens, responses, replace(plain, mean=2.0, std=4.0, clip=0.5), 9)
    assert scores.equal(torch.full(scores.shape, -0.5)), "one part, the empty response, stands to the end"
    scores = score_parts(collector.runtime, collector.tokens, responses, replace(plain, mean=2.0, std=4.0, clip=0.5), 1)
    assert_close(scores, ((lengths - 2.0) / 4.0).clamp(-0.5, 0.5))
    assert scores.unique().numel() > 2


def test_a_reward_that_fails_on_a_part_says_so(collector_of):
    collector = collector_of(rollout={"max_new_tokens": 4})
    responses = collector.sample(prompts_for(collector), Seeds(0, 1))

    def reward(prompts, texts):
        return [1 / (4 - len(text)) for text in texts] if any(texts) else [0.0] * len(texts)

    parts = {text for row in range(5) for text in parts_of(collector, responses, row, 1)}
    assert any(len(text) == 4 for text in parts)
    with pytest.raises(FailedScoring, match=r"ZeroDivisionError.* unfinished responses \(reward\.partial_every=1\)"):
        score_parts(collector.runtime, collector.tokens, responses, Reward(terms=(("reward", 1.0, reward),)), 1)


def test_a_part_that_has_no_finite_score_leaves_the_one_before(collector_of):
    collector = collector_of(rollout={"max_new_tokens": 12})
    responses = collector.sample(prompts_for(collector), Seeds(0, 1))

    def reward(prompts, texts):
        return [math.nan if len(text) % 2 == 0 else float(len(text)) for text in texts]

    scores = score_parts(collector.runtime, collector.tokens, responses, Reward(terms=(("reward", 1.0, reward),)), 1)
    left = 0
    for row in range(5):
        last = 0.0  # before any
        for t, part in enumerate(reward((), parts_of(collector, responses, row, 1))):
            left += last > 0 and math.isnan(part)
            last = last if math.isnan(part) else part
            assert scores[row, t] == last
    assert left, "some stand for a part that has none"


def test_a_batch_of_one(collector_of):
    collector = collector_of()
    prompt = prompts_for(collector).select(torch.tensor([0]))
    responses = collector.sample(prompt, Seeds(0, 1))
    rollout = collector.forward(prompt, responses, torch.ones(1), torch.ones(responses.sequences.responses.shape))
    assert len(rollout) == 1


def test_sampling_settings_are_those_of_the_config():
    config = RolloutConfig(max_new_tokens=7, min_new_tokens=3, temperature=0.5, top_k=9, top_p=0.8)
    assert vars(sampling_settings(config)) == {
        "max_new_tokens": 7,
        "min_new_tokens": 3,
        "temperature": 0.5,
        "top_k": 9,
        "top_p": 0.8,
    }


# Nothing twice, and nothing too large


@pytest.mark.parametrize("critic", ["head", "separate", "adapter"])
def test_what_was_said_while_sampling_is_what_another_pass_says(collector_of, critic):
    found = []
    for source in ("sampled", "recomputed"):
        collector = collector_of(
            model={"critic": critic},
            lora={"r": 4, "target_modules": "all-linear"} if critic == "adapter" else {},
            rollout={"logprobs": source, "stop": LETTERS, "max_new_tokens": 12, "temperature": 0.9},
        )
        head = collector.runtime.plain_module.value_head
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-1, 1, head.weight.numel())[None])
        found.append(rolled_out(collector))
    one, other = found
    mask = one.sequences.response_mask
    assert 5 < int(mask.sum()) < mask.numel(), "some end early, some do not"
    assert one.sequences.responses.equal(other.sequences.responses)
    for name in ("logprobs", "values", "entropy", "ref_logprobs"):
        ours, theirs = getattr(one, name)[mask], getattr(other, name)[mask]
        assert ours.abs().min() > 0
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_no_pass_holds_more_tokens_than_allowed(collector_of):
    collector = collector_of(rollout={"stop": LETTERS, "max_new_tokens": 12, "logprobs": "sampled"})
    sizes = []
    collector.reference.register_forward_pre_hook(
        lambda _, inputs: sizes.append((len(inputs[0]), inputs[0].shape[1] + inputs[2].shape[1]))
    )
    whole = rolled_out(replace(collector, pass_tokens=8192))
    assert len(sizes) == 1, "five short rows"
    sizes.clear()
    parts = rolled_out(replace(collector, pass_tokens=30))
    assert sum(rows for rows, _ in sizes) == 5 and len(sizes) > 1
    assert all(rows * width <= 30 or rows == 1 for rows, width in sizes)
    mask = whole.sequences.response_mask
    torch.testing.assert_close(parts.ref_logprobs[mask], whole.ref_logprobs[mask], atol=1e-5, rtol=0)


def test_samples_of_one_prompt_have_random_numbers_of_their_own(collector_of):
    collector = collector_of()
    one, four = prompts_for(collector), prompts_for(collector).repeated(4)
    assert four.index.tolist() == [i for i in range(5) for _ in range(4)] and four.sample.tolist() == list(range(20))
    sampled = collector.sample(four, Seeds(0, 1)).sequences.responses
    assert len({tuple(row) for row in sampled[:4].tolist()}) == 4
    alone = collector.sample(one.select(torch.tensor([0])), Seeds(0, 1)).sequences.responses
    assert alone[0].equal(sampled[0]), "the sample's number alone keys it"
    scores, parts = torch.zeros(20), torch.zeros(sampled.shape)
    assert collector.forward(four, collector.sample(four, Seeds(0, 1)), scores, parts).groups.equal(four.index)


@pytest.mark.parametrize("source", ["sampled", "recomputed"])
def test_without_a_critic_nothing_has_values(collector_of, source):
    collector = collector_of(critic=False, rollout={"logprobs": source})
    module = collector.runtime.plain_module
    assert not module.has_critic and not any("value" in name for name, _ in module.named_parameters())
    rollout = rolled_out(collector)
    assert rollout.values is None and rollout.select(torch.tensor([1])).values is None
    assert rollout_fault(rollout, 1) is None
    assert rollout.logprobs.equal(rolled_out(collector_of(rollout={"logprobs": source})).logprobs)


def test_an_engine_is_whatever_generates(collector_of):
    collector = collector_of()

    class Recorded:
        exact = repeatable = False

        def generate(self, prompts, settings, seeds):
            return collector.engine.generate(prompts, settings, Seeds(7, 7))

        def sync(self, weights): ...

    other = replace(collector, engine=Recorded())
    seen = other.sample(prompts_for(other), Seeds(0, 1))
    assert seen.texts == collector.sample(prompts_for(other), Seeds(7, 7)).texts
