"""Sampling and assessing: a response depends on seed, step and row alone, and is judged by the models as they are."""

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
from rlhf_accel.models import policy as models
from rlhf_accel.models import policy_with_value
from rlhf_accel.models.reference import load_reference
from rlhf_accel.reward import Reward
from rlhf_accel.rollout.scoring import FailedScoring, Sampler, sampling_settings

pytestmark = pytest.mark.usefixtures("exact_fp32")

PROMPTS = ["The film", "A", "It is long, it is slow", "Bad acting", "An odd little film"]
LETTERS = ["e", "t", "a", "i"]  # stop texts that a random model soon writes


@pytest.fixture
def sampler_of(tiny):
    """A function that makes a sampler of a tiny model."""

    def make(**sections):
        config = tiny(**sections)
        runtime, tokens = Runtime(config.run), Tokens.load(config.model.name_or_path)
        policy = models.load_policy(config, config.model.name_or_path, runtime.device)
        reference = load_reference(config, policy)
        module = policy_with_value.build(config, policy, config.model.name_or_path, None)
        runtime.prepare(module, torch.optim.AdamW(module.parameters()))
        return Sampler(
            config=config.rollout,
            runtime=runtime,
            tokens=tokens,
            reference=reference,
            pass_tokens=config.ppo.micro_batch_tokens,
            keeps_said=config.rollout.logprobs == "sampled",
            fast_kernels=config.run.fast_kernels,
        )

    return make


def prompts_for(sampler, columns=None):
    return data.prompt_batch(sampler.tokens.encode(PROMPTS), sampler.tokens, columns)


def assessed(sampler, seed=0, step=1):
    prompts = prompts_for(sampler)
    responses = sampler.sample(prompts, seed=seed, step=step)
    nothing = torch.zeros(responses.sequences.responses.shape)
    return sampler.assess(responses, torch.arange(5.0), nothing, len(prompts))


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


def test_sampling_follows_seed_and_step_alone(sampler_of):
    sampler = sampler_of(rollout={"stop": LETTERS})
    first = sampler.sample(prompts_for(sampler), seed=0, step=1)
    torch.rand(3)
    again = sampler.sample(prompts_for(sampler), seed=0, step=1)
    assert torch.equal(again.sequences.responses, first.sequences.responses)
    assert torch.equal(again.sequences.response_mask, first.sequences.response_mask)
    for seed, step in ((1, 1), (0, 2)):
        other = sampler.sample(prompts_for(sampler), seed=seed, step=step)
        assert not torch.equal(other.sequences.responses, first.sequences.responses)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_how_many_rows_go_through_at_once_does_not_matter(sampler_of, size):
    whole = assessed(sampler_of(rollout={"stop": LETTERS}))
    parts = assessed(sampler_of(rollout={"stop": LETTERS, "forward_batch_size": size}))
    mask = whole.sequences.response_mask
    assert 5 < mask.sum() < mask.numel(), "rows of all lengths make this a test"
    assert torch.equal(parts.sequences.responses, whole.sequences.responses)
    assert torch.equal(parts.sequences.response_mask, mask)
    assert torch.equal(parts.finished, whole.finished)
    for name in ("logprobs", "ref_logprobs", "values", "entropy"):
        assert_close(getattr(parts, name)[mask], getattr(whole, name)[mask], atol=1e-5, rtol=1e-5)
    assert parts.texts == whole.texts


def test_a_row_keeps_its_response_in_another_company(sampler_of):
    sampler = sampler_of()
    prompts = prompts_for(sampler)
    whole = sampler.sample(prompts, seed=0, step=1)
    rows = torch.tensor([3, 1])
    few = sampler.sample(prompts.select(rows), seed=0, step=1)
    assert torch.equal(few.sequences.responses, whole.sequences.responses[rows])


@pytest.mark.parametrize(
    ("lora", "rollout"),
    [({}, {}), ({}, {"temperature": 0.7}), ({}, {"top_k": 5}), ({}, {"top_p": 0.5}), ({"r": 4}, {"temperature": 1.3})],
)
def test_assess_agrees_with_plain_transformers(sampler_of, gpt2_folder, lora, rollout):
    """Also under top-k and top-p: what learns is the policy as a whole, not the part of it that was sampled from."""
    sampler = sampler_of(lora=lora, rollout={"stop": LETTERS, **rollout})
    rollout = assessed(sampler)
    mask = rollout.sequences.response_mask
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    rows = logprobs_one_by_one(plain, rollout, sampler.config.temperature)
    assert_rows(rollout.logprobs, rows, mask)
    assert_rows(rollout.ref_logprobs, rows, mask)
    # Before any learning the two are one model: not about, but exactly.
    assert torch.equal(rollout.logprobs[mask], rollout.ref_logprobs[mask])
    assert torch.equal(rollout.values, torch.zeros_like(rollout.values))


@pytest.mark.parametrize("lora", [{}, {"r": 4}])
def test_the_reference_stays_when_the_policy_moves(sampler_of, gpt2_folder, lora):
    sampler = sampler_of(lora=lora)
    module = sampler.runtime.plain_module
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    rollout = assessed(sampler)
    plain = AutoModelForCausalLM.from_pretrained(gpt2_folder).eval()
    assert_rows(rollout.ref_logprobs, logprobs_one_by_one(plain, rollout, 1.0), rollout.sequences.response_mask)
    assert_rows(rollout.logprobs, logprobs_one_by_one(module.policy, rollout, 1.0), rollout.sequences.response_mask)
    assert (rollout.logprobs - rollout.ref_logprobs).abs().max() > 0.1
    assert rollout.values.abs().max() > 0.01


def test_masks_end_with_the_stop_and_texts_are_what_was_sampled(sampler_of):
    sampler = sampler_of(rollout={"stop": LETTERS})
    responses = sampler.sample(prompts_for(sampler), seed=0, step=1)
    assert responses.prompts == tuple(PROMPTS)
    assert responses.finished.any()
    assert not responses.finished.all()
    for i, text in enumerate(responses.texts):
        mask = responses.sequences.response_mask[i]
        length = int(mask.sum())
        assert torch.equal(mask, torch.arange(len(mask)) < length)
        sampled = responses.sequences.responses[i, :length].tolist()
        assert text == sampler.tokens.text(sampler.tokens.encode([PROMPTS[i]])[0] + sampled)[len(PROMPTS[i]) :]
        holds_stop = any(letter in text for letter in LETTERS)
        assert bool(responses.finished[i]) == holds_stop
        assert holds_stop or length == sampler.config.max_new_tokens
        before = sampler.tokens.text(sampled[:-1])
        assert not any(letter in before for letter in LETTERS), "a token after the stop counts"


def test_an_end_of_text_token_ends_a_response_and_counts(sampler_of):
    sampler = sampler_of()
    policy = sampler.runtime.plain_module.policy
    # A vocabulary layer that always says "end of text", whose id is also the padding's.
    eos = policy.config.eos_token_id
    handle = policy.lm_head.register_forward_hook(
        lambda _, inputs, logits: torch.zeros_like(logits).index_fill(-1, torch.tensor([eos]), 50.0)
    )
    try:
        responses = sampler.sample(prompts_for(sampler), seed=0, step=1)
    finally:
        handle.remove()
    assert sampler.tokens.pad_id == eos
    assert responses.sequences.response_mask.sum(1).tolist() == [1] * 5
    assert responses.finished.all()
    assert responses.texts == ("",) * 5


def test_rewards_read_prompts_responses_and_columns(sampler_of):
    sampler, seen = sampler_of(), {}

    def reward(prompts, responses, number):
        seen.update(prompts=prompts, responses=responses)
        return [2.0 * n for n in number]

    responses = sampler.sample(prompts_for(sampler, {"number": [1, 2, 3, 4, 5]}), seed=0, step=1)
    scores = sampler.score(responses, Reward(terms=(("reward", 1.0, reward),)))
    assert scores.tolist() == [2.0, 4.0, 6.0, 8.0, 10.0]
    assert seen == {"prompts": PROMPTS, "responses": list(responses.texts)}
    partial_scores = torch.rand(responses.sequences.responses.shape)
    rollout = sampler.assess(responses, scores, partial_scores, 5)
    assert rollout.partial_scores.equal(partial_scores)
    assert rollout.scores.tolist() == scores.tolist()
    assert (rollout.prompts, rollout.texts) == (responses.prompts, responses.texts)


def parts_of(sampler, responses, row, every):
    """The text of the response before each of its tokens, as read every so many."""
    prompt = sampler.tokens.encode([PROMPTS[row]])[0]
    ids = responses.sequences.responses[row][responses.sequences.response_mask[row]].tolist()
    return [sampler.tokens.text(prompt + ids[: t - t % every])[len(PROMPTS[row]) :] for t in range(len(ids))]


def test_partial_scores_are_those_of_the_response_before_each_token(sampler_of):
    sampler = sampler_of(rollout={"stop": LETTERS, "max_new_tokens": 12})
    responses = sampler.sample(prompts_for(sampler, {"number": [1, 2, 3, 4, 5]}), seed=0, step=1)
    lengths = responses.sequences.response_mask.sum(1).tolist()
    assert min(lengths) <= 6 < max(lengths), "not all have a third part"
    read = []

    def reward(prompts, texts, number):
        read.extend(prompts)
        return [100.0 * n + len(text) for text, n in zip(texts, number, strict=True)]

    scores = sampler.score_parts(responses, Reward(terms=(("reward", 1.0, reward),)), 3)
    for i, length in enumerate(lengths):
        expected = [100.0 * (i + 1) + len(text) for text in parts_of(sampler, responses, i, 3)]
        assert scores[i, :length].tolist() == expected
    assert len(read) == sum(math.ceil(length / 3) for length in lengths), "no part is read that no token follows"
    assert set(read) == set(PROMPTS)
    assert not sampler.score_parts(responses, Reward(terms=()), 0).any(), "for 0 no reward is asked"


def test_parts_are_calibrated_and_clipped_as_whole_responses_are(sampler_of):
    sampler = sampler_of(rollout={"max_new_tokens": 6})
    responses = sampler.sample(prompts_for(sampler), seed=0, step=1)

    def reward(prompts, texts):
        return [float(len(text)) for text in texts]

    plain = Reward(terms=(("reward", 1.0, reward),))
    lengths = sampler.score_parts(responses, plain, 1)
    scores = sampler.score_parts(responses, replace(plain, mean=2.0, std=4.0, clip=0.5), 9)
    assert scores.equal(torch.full(scores.shape, -0.5)), "one part, the empty response, stands to the end"
    scores = sampler.score_parts(responses, replace(plain, mean=2.0, std=4.0, clip=0.5), 1)
    assert_close(scores, ((lengths - 2.0) / 4.0).clamp(-0.5, 0.5))
    assert scores.unique().numel() > 2


def test_a_reward_that_fails_on_a_part_says_so(sampler_of):
    sampler = sampler_of(rollout={"max_new_tokens": 4})
    responses = sampler.sample(prompts_for(sampler), seed=0, step=1)

    def reward(prompts, texts):
        return [1 / (4 - len(text)) for text in texts] if any(texts) else [0.0] * len(texts)

    parts = {text for row in range(5) for text in parts_of(sampler, responses, row, 1)}
    assert any(len(text) == 4 for text in parts)
    with pytest.raises(FailedScoring, match=r"ZeroDivisionError.* unfinished responses \(reward\.partial_every=1\)"):
        sampler.score_parts(responses, Reward(terms=(("reward", 1.0, reward),)), 1)


def test_a_part_that_has_no_finite_score_leaves_the_one_before(sampler_of):
    sampler = sampler_of(rollout={"max_new_tokens": 12})
    responses = sampler.sample(prompts_for(sampler), seed=0, step=1)

    def reward(prompts, texts):
        return [math.nan if len(text) % 2 == 0 else float(len(text)) for text in texts]

    scores = sampler.score_parts(responses, Reward(terms=(("reward", 1.0, reward),)), 1)
    left = 0
    for row in range(5):
        last = 0.0  # before any
        for t, score in enumerate(reward((), parts_of(sampler, responses, row, 1))):
            left += last > 0 and math.isnan(score)
            last = last if math.isnan(score) else score
            assert scores[row, t] == last
    assert left, "some stand for a part that has none"


def test_a_batch_of_one(sampler_of):
    sampler = sampler_of()
    prompt = prompts_for(sampler).select(torch.tensor([0]))
    responses = sampler.sample(prompt, seed=0, step=1)
    rollout = sampler.assess(responses, torch.ones(1), torch.ones(responses.sequences.responses.shape), 1)
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
def test_what_was_said_while_sampling_is_what_another_pass_says(sampler_of, critic):
    found = []
    for source in ("sampled", "recomputed"):
        sampler = sampler_of(
            model={"critic": critic},
            lora={"r": 4, "target_modules": "all-linear"} if critic == "adapter" else {},
            rollout={"logprobs": source, "stop": LETTERS, "max_new_tokens": 12, "temperature": 0.9},
        )
        head = sampler.runtime.plain_module.value_head
        with torch.no_grad():
            head.weight.copy_(torch.linspace(-1, 1, head.weight.numel())[None])
        found.append(assessed(sampler))
    one, other = found
    mask = one.sequences.response_mask
    assert 5 < int(mask.sum()) < mask.numel(), "some end early, some do not"
    assert one.sequences.responses.equal(other.sequences.responses)
    for name in ("logprobs", "values", "entropy", "ref_logprobs"):
        ours, theirs = getattr(one, name)[mask], getattr(other, name)[mask]
        assert ours.abs().min() > 0
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_no_pass_holds_more_tokens_than_allowed(sampler_of):
    sampler = sampler_of(rollout={"stop": LETTERS, "max_new_tokens": 12, "logprobs": "sampled"})
    sizes = []
    sampler.reference.register_forward_pre_hook(
        lambda _, inputs: sizes.append((len(inputs[0]), inputs[0].shape[1] + inputs[2].shape[1]))
    )
    whole = assessed(replace(sampler, pass_tokens=8192))
    assert len(sizes) == 1, "five short rows"
    sizes.clear()
    parts = assessed(replace(sampler, pass_tokens=30))
    assert sum(rows for rows, _ in sizes) == 5 and len(sizes) > 1
    assert all(rows * width <= 30 or rows == 1 for rows, width in sizes)
    mask = whole.sequences.response_mask
    torch.testing.assert_close(parts.ref_logprobs[mask], whole.ref_logprobs[mask], atol=1e-5, rtol=0)
