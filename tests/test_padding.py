"""The probes padded = alone and sampled = recomputed, with faults planted."""

import pytest
import torch

from rlhf_accel.models import calls, probes
from rlhf_accel.rollout import padding
from rlhf_accel.rollout import sampling as decoding
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("exact_fp32")


def shifted(mask, first=0):
    return (mask.long().cumsum(1) - 1).clamp(min=0) + 1


def unmasked(mask, first=0):
    return torch.arange(mask.shape[1]).expand(mask.shape)


@pytest.mark.parametrize(
    ("positions", "reason"), [(shifted, "counts positions in another way"), (unmasked, "padding on the left")]
)
def test_a_run_with_other_positions_is_refused_before_anything_is_written(
    positions, reason, tiny, monkeypatch, tmp_path
):
    for module in (calls, decoding):
        monkeypatch.setattr(module, "position_ids", positions)
    with pytest.raises(ConfigError, match=f"^model.name_or_path=.* gpt2: .* differ by .* nats .*{reason}") as raised:
        PPOTrainer(tiny())
    assert raised.value.key == "model.name_or_path" and not (tmp_path / "run").exists()


def test_the_critic_is_looked_at_too(tiny, monkeypatch):
    whole = calls.response_hidden
    monkeypatch.setattr(padding, "response_hidden", lambda trunk, *inputs: whole(trunk, *inputs).roll(1, 1))
    with pytest.raises(ConfigError, match="the critic's states in a padded batch and alone differ by"):
        PPOTrainer(tiny(model={"critic": "separate"}))


def test_a_cache_that_forgets(tiny, monkeypatch):
    accepted = calls.accepted

    def forgetful(model, **extras):
        return {name: value for name, value in accepted(model, **extras).items() if name != "past_key_values"}

    trainer = PPOTrainer(tiny())
    batch = padding.made_up(torch.arange(20, 40), 0)
    look = (trainer.runtime.plain_module.policy, batch, 0, torch.float32)
    monkeypatch.setattr(decoding, "accepted", forgetful)
    assert padding.sampled_is_recomputed(*look).passed  # without a cache all is read again, and is right
    monkeypatch.setattr(decoding, "position_ids", shifted)
    found = padding.sampled_is_recomputed(*look)
    assert not found.passed and "its cache does not continue a text" in found.message


def test_a_run_whose_cache_forgets_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(decoding, "position_ids", shifted)  # of sampling alone
    with pytest.raises(ConfigError, match=r"^model.name_or_path=.* gpt2: .* differ by .*its cache does not continue"):
        PPOTrainer(tiny())


def test_a_reward_model_padded_otherwise_is_refused(tiny, gpt2_classifier_folder, monkeypatch):
    reward = {"function": [], "model": str(gpt2_classifier_folder), "dtype": "fp32"}
    PPOTrainer(tiny(reward=reward))
    monkeypatch.setattr(probes, "rounding_limit", lambda *_: -1.0)
    with pytest.raises(ConfigError, match=r"reward\.model=.*a text's score changes") as raised:
        PPOTrainer(tiny(reward=reward))
    assert raised.value.key == "reward.batch_size"


def test_a_model_that_cannot_be_run_is_one_line():
    def look():
        raise IndexError("list index\nout of range")

    said = padding.problem(look)
    assert said is not None and "(IndexError: list index out of range)" in said
