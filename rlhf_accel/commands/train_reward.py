"""Train a reward model on human feedback."""

from __future__ import annotations

import transformers

from rlhf_accel.config.reward_schema import RewardTrainingConfig
from rlhf_accel.system import console
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.training.reward_trainer import RewardTrainer


def main(config: RewardTrainingConfig) -> None:
    console.may_fail()
    tune_process()
    quiet_libraries()
    transformers.utils.logging.set_verbosity_error()  # it warns about the new head, which is meant
    RewardTrainer(config).fit()
