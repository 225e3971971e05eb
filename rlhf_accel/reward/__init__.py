"""Scores of texts: a weighted sum (`weighted.py`) of a classifier (`classifier.py`), a server (`server.py`) and Python
functions (`functions.py`), called and checked by `calls.py`.

A reward sees text only: no token ids of the policy, no model that is trained, and no rank.
"""

from rlhf_accel.reward.calls import RewardError, RewardFunction
from rlhf_accel.reward.cautions import cautions
from rlhf_accel.reward.classifier import Classifier, SharedBase, reward_dtype
from rlhf_accel.reward.functions import import_function, vader
from rlhf_accel.reward.loading import load_golds, load_reward, load_reward_here, reward_of
from rlhf_accel.reward.server import TOKEN_VARIABLE, RemoteReward
from rlhf_accel.reward.weighted import Reward

__all__ = [
    "TOKEN_VARIABLE",
    "Classifier",
    "RemoteReward",
    "Reward",
    "RewardError",
    "RewardFunction",
    "SharedBase",
    "cautions",
    "import_function",
    "load_golds",
    "load_reward",
    "load_reward_here",
    "reward_dtype",
    "reward_of",
    "vader",
]
