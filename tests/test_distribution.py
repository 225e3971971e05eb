"""The sampling distribution in words."""

import pytest

from rlhf_accel.config.distribution import distribution, in_words, truncated
from rlhf_accel.config.schema import RolloutConfig


@pytest.mark.parametrize(
    ("config", "words", "keys"),
    [
        (RolloutConfig(), "temperature 1", None),
        (RolloutConfig(temperature=0.7), "temperature 0.7", None),
        (RolloutConfig(top_k=5), "temperature 1, top_k 5", "rollout.top_k=5:"),
        (RolloutConfig(top_p=0.5), "temperature 1, top_p 0.5", "rollout.top_p=0.5:"),
        (
            RolloutConfig(top_k=1, top_p=0.9),
            "temperature 1, top_k 1, top_p 0.9",
            "rollout.top_k=1 and rollout.top_p=0.9:",
        ),
    ],
)
def test_a_distribution_is_named_with_a_caution_if_truncated(config, words, keys):
    assert in_words(distribution(config)) == words
    assert (truncated(config) or "").startswith(keys or "") and (truncated(config) is None) == (keys is None)
