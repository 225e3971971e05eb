"""What a run is made of, for training and for a look at it."""

from __future__ import annotations

import pytest

from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.setup import Setup, start


def test_a_look_starts_no_tracker(tiny, monkeypatch) -> None:
    config = tiny(run={"trackers": ["wandb"]})
    monkeypatch.setattr("rlhf_accel.distributed.trackers.get_available_trackers", lambda: [])
    with pytest.raises(ConfigError) as error:
        start(config)
    assert error.value.key == "run.trackers"
    start(config, training=False)


def test_a_look_that_only_samples_has_no_critic_and_leaves_the_disk_alone(tiny, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    critic = {"critic": "adapter", "gradient_checkpointing": True}
    config = tiny(lora={"r": 4}, model=critic, reward={"partial_every": 2})
    setup = Setup.of(config, start(config, training=False), critic=False)
    module = setup.runtime.plain_module
    assert not module.has_critic and not any("critic" in name for name, _ in module.named_parameters())
    assert not any(getattr(layer, "gradient_checkpointing", False) for layer in module.modules())
    assert sorted(tmp_path.rglob("*")) == before
