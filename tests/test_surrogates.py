"""Losses of the policy: by hand, against slow implementations of their own, and gradients by finite differences."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.batches import Experience, Sequences, TokenOutputs
from rlhf_accel.algorithm.kl import kl_estimate
from rlhf_accel.algorithm.masked import masked_sum
from rlhf_accel.config.schema import PPOConfig
from rlhf_accel.training.losses import loss_terms

LOW, HIGH, DUAL = 0.2, 0.28, 3.0
CLIPS = [ppo.Clip(LOW, LOW), ppo.Clip(LOW, HIGH), ppo.Clip(LOW, HIGH, DUAL)]


def batch(seed: int, rows: int = 6, width: int = 5) -> tuple[torch.Tensor, ...]:
    """logprobs, old_logprobs, advantages and a mask with rows of 0 to `width` tokens; NaN where masked out."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    old = -3 * torch.rand(rows, width, generator=generator)
    new = old + torch.randn(rows, width, generator=generator)
    advantages = torch.randn(rows, width, generator=generator)
    return (*(torch.where(mask, x, torch.nan) for x in (new, old, advantages)), mask)


def slowly(form: str, new, old, advantages, mask, clip: ppo.Clip) -> list[list[float]]:
    """The loss of each token that counts, by row, in Python's floats."""
    rows = []
    for i in range(len(mask)):
        n = int(mask[i].sum())
        ratios = [math.exp(float(new[i, t] - old[i, t])) for t in range(n)]
        if form == "gspo":
            ratios = [math.prod(ratios) ** (1 / max(n, 1))] * n
        losses = []
        for t in range(n):
            advantage, ratio = float(advantages[i, t]), ratios[t]
            if form == "cispo":
                losses.append(-min(ratio, 1 + clip.high) * advantage * float(new[i, t]))
                continue
            loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - clip.low), 1 + clip.high))
            if clip.dual is not None and advantage < 0:
                loss = min(loss, -advantage * clip.dual)
            losses.append(loss)
        rows.append(losses)
    return rows


@pytest.mark.parametrize("clip", CLIPS, ids=["clip", "higher", "dual"])
@pytest.mark.parametrize("form", ppo.SURROGATES)
@pytest.mark.parametrize("seed", range(4))
def test_each_equals_a_slow_one_under_every_reduction(form, clip, seed):
    made = batch(seed)
    mask, rows = made[-1], slowly(form, *made, clip)
    tokens = [loss for row in rows for loss in row]
    means = [sum(row) / len(row) for row in rows if row]
    expected = {
        "token": sum(tokens) / len(tokens),
        "sequence": sum(means) / len(rows),
        "constant": sum(tokens) / mask.numel(),
    }
    for reduction, value in expected.items():
        loss = ppo.policy_loss(*made, clip, form, ppo.row_weights(mask, reduction)).loss
        assert float(loss / ppo.denominator(mask, reduction)) == pytest.approx(value, rel=1e-4, abs=1e-6), reduction


def test_by_hand():
    """One token whose ratio is 4, with advantages 1 and -1, at 0.2, 0.5 above, and a dual clip of 3."""
    old, mask, clip = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), ppo.Clip(0.2, 0.5, 3.0)
    new = torch.full((1, 1), math.log(4.0))

    def of(form: str, advantage: float, clip: ppo.Clip = clip) -> tuple[float, float]:
        found = ppo.policy_loss(new, old, torch.tensor([[advantage]]), mask, clip, form)
        return pytest.approx(float(found.loss)), float(found.clipped)

    assert of("clip", 1.0) == (-1.5, 1.0)
    assert of("clip", -1.0) == (3.0, 1.0)
    assert of("clip", -1.0, ppo.Clip(0.2, 0.5)) == (4.0, 0.0)
    assert of("gspo", 1.0) == (-1.5, 1.0)
    assert of("cispo", 1.0) == (-1.5 * math.log(4.0), 1.0)


def differences(loss, x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    found = torch.zeros_like(x)
    for place in range(x.numel()):
        step = torch.zeros_like(x).flatten()
        step[place] = eps
        step = step.view(x.shape)
        found.view(-1)[place] = (loss(x + step) - loss(x - step)) / (2 * eps)
    return found


@pytest.mark.parametrize("form", ["clip", "gspo"])
@pytest.mark.parametrize("clip", CLIPS, ids=["clip", "higher", "dual"])
def test_gradients_by_finite_differences(form, clip, monkeypatch):
    """In fp64, for which the casts to fp32 are taken away."""
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    new, old, advantages, mask = (x.double() if x.is_floating_point() else x for x in batch(3))
    new = new.nan_to_num().requires_grad_()
    weights = ppo.row_weights(mask, "sequence")

    def loss(x: torch.Tensor) -> torch.Tensor:
        return ppo.policy_loss(x, old, advantages, mask, clip, form, weights).loss

    loss(new).backward()
    assert_close(new.grad, differences(loss, new.detach()), atol=1e-6, rtol=1e-5)


def test_cispo_has_the_gradient_of_a_weighted_log_likelihood():
    new, old, advantages, mask = batch(5)
    new = new.nan_to_num().requires_grad_()
    ppo.policy_loss(new, old, advantages, mask, ppo.Clip(LOW, HIGH), "cispo").loss.backward()
    weight = (new.detach() - old).exp().clamp(max=1 + HIGH)
    assert_close(new.grad, torch.where(mask, -weight * advantages, 0.0))
    assert (weight[mask] == 1 + HIGH).any(), "some are cut, and keep a gradient"


@pytest.mark.parametrize("form", ppo.SURROGATES)
def test_at_ratio_1_each_has_the_gradient_of_reinforce(form):
    _, old, advantages, mask = batch(7)
    new = old.nan_to_num().requires_grad_()
    found = ppo.policy_loss(new, old, advantages, mask, ppo.Clip(LOW, HIGH), form)
    found.loss.backward()
    expected = torch.where(mask, -advantages, 0.0)
    if form == "gspo":  # the response's ratio has a gradient of 1 / length by each token
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        expected = torch.where(mask, (expected.sum(1, keepdim=True) / lengths).expand(mask.shape), 0.0)
    assert_close(new.grad, expected)
    assert float(found.clipped) == 0


def test_a_range_that_is_none_is_refused():
    for wrong in ({"low": 0.0, "high": 0.2}, {"low": 0.2, "high": -1.0}, {"low": 0.2, "high": 0.2, "dual": 1.0}):
        with pytest.raises(ValueError, match="clip"):
            ppo.Clip(**wrong)


# The KL in the loss, on a policy whose expectations are sums over three tokens

REFERENCE = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)


def expected_gradient(estimator: str) -> torch.Tensor:
    """Of the estimator in a loss: the mean over the policy's own tokens of its gradient, with the sample held fixed."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    estimates = kl_estimate(logprobs[None], REFERENCE.log()[None], estimator)[0]
    (logprobs.exp().detach() * estimates).sum().backward()
    return logits.grad


def gradient_of(kl) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    kl(logits.log_softmax(0)).backward()
    return logits.grad


def test_the_gradients_that_the_config_promises(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    to_reference = gradient_of(lambda logprobs: (logprobs.exp() * (logprobs - REFERENCE.log())).sum())
    from_reference = gradient_of(lambda logprobs: (REFERENCE * (REFERENCE.log() - logprobs)).sum())
    assert_close(expected_gradient("k1"), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(expected_gradient("k2"), to_reference)
    assert_close(expected_gradient("k3"), from_reference)


def test_the_kl_is_a_term_of_the_loss_with_its_weight():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ones = torch.ones(2, 3)
    experience = Experience(
        sequences=Sequences(
            queries=torch.ones(2, 1, dtype=torch.int64),
            query_mask=torch.ones(2, 1, dtype=torch.bool),
            responses=torch.ones(2, 3, dtype=torch.int64),
            response_mask=mask,
        ),
        old_logprobs=-ones,
        ref_logprobs=torch.where(mask, -2.0, torch.nan),
        old_values=None,
        rewards=ones,
        advantages=2.0 * ones,
        returns=None,
    )
    logprobs = torch.where(mask, -1.0, torch.inf).requires_grad_()
    config = PPOConfig(kl_in="loss", kl_estimator="k2", advantage="rloo")
    outputs = TokenOutputs(logprobs=logprobs, values=None, entropy=ones)
    by_row = loss_terms(outputs, experience, mask, replace(config, loss_reduction="sequence", entropy_coef=1.0), 0.1)
    assert float(by_row.sums["kl"].detach()) == pytest.approx(2 * 0.5)
    assert float(by_row.sums["total"].detach()) == pytest.approx(2 * (-2.0 + 0.1 * 0.5 - 1.0))
    sums = loss_terms(TokenOutputs(logprobs=logprobs, values=None, entropy=None), experience, mask, config, 0.1).sums
    assert float(sums["kl"].detach()) == pytest.approx(3 * 0.5)
    assert float(sums["total"].detach()) == pytest.approx(3 * -2.0 + 0.1 * 3 * 0.5)
    sums["total"].backward()
    assert_close(logprobs.grad, torch.where(mask, -2.0 + 0.1, 0.0))
    assert masked_sum(logprobs.detach(), mask).isfinite()


SWITCHES = {
    "clip-higher": {"cliprange_high": 5.0, "cliprange": 1e-3},
    "dual clip": {"dual_clip": 1.0001, "cliprange": 1e-3},
    "cispo": {"policy_loss": "cispo"},
    "gspo": {"policy_loss": "gspo", "loss_reduction": "sequence"},
    "sequence": {"loss_reduction": "sequence"},
    "constant": {"loss_reduction": "constant"},
    "k2 in the loss": {"kl_in": "loss", "kl_estimator": "k2", "kl_coef": 5.0},
    "k3 in the loss": {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 5.0},
}


@pytest.fixture
def steps(tiny):
    from rlhf_accel.training.ppo_trainer import PPOTrainer

    def run(**ppo_keys) -> list[dict[str, float]]:
        keys = {"ppo_epochs": 4, **ppo_keys}
        trainer = PPOTrainer(tiny(ppo=keys, rollout={"stop": ["e", "t"]}, optim={"lr": 1e-2}))
        return [trainer.step(trainer.setup.prompts.batch(step, 8)) for step in (1, 2)]

    return run


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_changes_the_run(steps, switch):
    plain, other = steps(), steps(**SWITCHES[switch])
    assert plain[1]["objective/entropy"] != other[1]["objective/entropy"]
    assert all(math.isfinite(value) for row in other for value in row.values())
    assert ("loss/kl" in other[0]) == ("loss" in SWITCHES[switch].get("kl_in", ""))
