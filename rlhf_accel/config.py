"""Every choice of a run: YAML and dotted overrides <-> frozen dataclasses.

Knows keys, types, ranges and contradictions, and the files of the recipes. Knows no tensor, no model and no rank.
Checks here need nothing but the config, so they fail before any model loads.
"""

from __future__ import annotations

import difflib
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints
from urllib.parse import urlsplit

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from rlhf_accel import files
from rlhf_accel.terminal import say, visible

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "movie_reviews"
_MOST_YAML, _MOST_YAML_PARTS = 256 << 10, 50_000  # bytes, for which PyYAML takes seconds; and parts behind aliases


def _not_a_truth_value(value: Any) -> Any:
    # Python counts True as 1; in a config `lr: true` is a slip.
    if isinstance(value, bool):
        raise ValueError("input should be a number, not true or false")
    return value


def _tuple_of_one(value: Any) -> Any:
    return (value,) if isinstance(value, (str, int, float)) else value


Number = Annotated[float, BeforeValidator(_not_a_truth_value)]
Count = Annotated[int, BeforeValidator(_not_a_truth_value)]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
BelowOne = Annotated[Number, Field(ge=0, lt=1)]
PositiveInt = Annotated[Count, Field(gt=0)]
NonNegativeInt = Annotated[Count, Field(ge=0)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Strings = Annotated[tuple[str, ...], BeforeValidator(_tuple_of_one)]
Floats = Annotated[tuple[Number, ...], BeforeValidator(_tuple_of_one)]

# Keys of local paths: a run keeps them absolute, older versions kept them as they were given.
_PATHS = ("model.name_or_path", "lora.adapter", "data.source", "data.eval_split", "reward.model")

# Keys that a run which goes on may change: what it has learnt and will learn does not depend on them but for rounding,
# except that total_steps is part of the learning rate's schedule, which people mean when they raise it.
MAY_CHANGE = frozenset(
    [
        *("run.output_dir", "run.name", "run.total_steps", "run.save_every", "run.keep_checkpoints", "run.checkpoint"),
        *("run.max_failed_saves", "run.max_skipped_steps", "run.eval_every", "run.sample_every", "run.sample_count"),
        *("run.resume", "run.changes", "run.collective_timeout", "run.trackers", "run.project", "run.best_kl_budget"),
        *("run.push_to_hub", "run.hub_private", "run.report", "reward.gold"),
        *("run.fast_kernels", "rollout.logprobs"),
        *("model.gradient_checkpointing", "rollout.gather_parameters", "rollout.forward_batch_size"),
        *(
            "reward.import_from",
            "reward.batch_size",
            "reward.timeout",
            "reward.retries",
            "reward.retry_wait",
            "ppo.micro_batch_tokens",
        ),
    ]
)

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, use_attribute_docstrings=True)


class ConfigError(ValueError):
    """A config or an input that cannot work: one line with what was found, what was expected and the key to change.

    The commands print it and exit with status 2. Line breaks in the message, such as a library's, become spaces.
    `key` is what to change: a key of the config or of the launch's files, a command-line option or an environment
    variable; None where no single one is at fault. `facts` holds what was found, by name, for code that reacts to the
    error: numbers and strings, never parts of the message. Where keys contradict each other, the fact `others` names
    those beside `key`.
    """

    def __init__(self, message: str, *, key: str | None = None, **facts: Any) -> None:
        super().__init__(_one_line(message))
        self.key = key
        self.facts = facts


class Finished(ConfigError):
    """There is nothing left to do: the commands print it and exit with status 0."""


class RunFailed(RuntimeError):
    """A run that cannot go on, after what could be saved was saved: one line with what happened and how to go on.

    The commands print it and exit with status 1. Line breaks become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def key_in(named: str) -> str:
    """The key of `key=value` or `--option value`, with which a message begins.

    >>> key_in("reward.model=gpt2"), key_in("--base gpt2"), key_in("data.pair_fields: row 1")
    ('reward.model', '--base', 'data.pair_fields')
    """
    return named.partition(" ")[0].partition("=")[0].removesuffix(":")


def _one_line(message: str) -> str:
    return visible(" ".join(line.strip() for line in message.splitlines()))


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RunConfig:
    seed: NonNegativeInt = 0
    """Root of all randomness: prompts, sampling and minibatches derive from it, the step and the sample's index."""
    output_dir: str | None = None
    """Folder of the run; by default the first free one of saved_models/NAME, saved_models/NAME-2, …"""
    name: str = "run"
    """Name of the run in its default folder, in trackers and in the model card."""
    total_steps: PositiveInt = 100
    """PPO steps; each samples one batch of responses and learns from it."""
    save_every: NonNegativeInt = 50
    """Steps between checkpoints; 0 writes one only when the run is asked to stop (SIGTERM, SIGUSR1)."""
    keep_checkpoints: NonNegativeInt = 2
    """Newest checkpoints that are kept; 0 keeps all."""
    checkpoint: Literal["sharded", "portable"] = "sharded"
    """How ZeRO writes checkpoints: each process its part, for the same launch to go on from; or whole, slower, for any
    launch. Without ZeRO they are always portable."""
    max_failed_saves: PositiveInt = 3
    """Checkpoints in a row that may fail to be written, of a full disk say, before the run stops."""
    max_skipped_steps: PositiveInt = 10
    """Steps in a row that may be skipped, because a score, a loss or a gradient is not finite, before the run stops."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on held-out prompts; 0 evaluates only before the first and after the last step."""
    eval_samples: NonNegativeInt = 256
    """Held-out prompts of an evaluation, always the same ones with the same seeds; 0 turns evaluation off."""
    best_kl_budget: Positive | None = None
    """best/ is the best held-out score among evaluations whose eval/kl is at most this many nats per response; null is
    no budget."""
    sample_every: NonNegativeInt = 10
    """Steps between tables of samples on the console and in samples.jsonl; 0 logs none."""
    sample_count: PositiveInt = 4
    """Samples in such a table."""
    resume: str | None = None
    """A checkpoint folder to go on from; `latest` for the newest whole one in run.output_dir; `auto` for the same, and
    to start where there is none yet, so that one command serves a job that is started again and again."""
    changes: Strings = ()
    """Keys that differ on purpose from the checkpoint's config, such as `optim.lr`; others must not, but for those that
    change no result (steps, intervals, folders, trackers, memory)."""
    collective_timeout: Positive = 3600.0
    """Seconds that a process waits for the others before it says which one is missing, and the run ends."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward passes: bf16 is autocast over the weights as loaded; auto is fp32 on a CPU, and bf16
    on a GPU that has it."""
    matmul_precision: Literal["medium", "high", "highest"] = "medium"
    """What fp32 matrix products may be rounded to on their way through faster units, as in
    torch.set_float32_matmul_precision: medium allows bf16 on a CPU that has such units and TF32 on a GPU, highest is
    exact fp32. What this device makes of it is printed at the start and written to environment.json."""
    fast_kernels: bool = True
    """On a CPU in fp32: oneDNN's matrix products for the vocabulary layer and, with weights laid out anew for each
    rollout, while sampling; no result changes beyond rounding."""
    trackers: Strings = ("tensorboard",)
    """Trackers that Accelerate's `log_with` knows, beside metrics.jsonl, which is always written."""
    project: str = "rlhf_accel"
    """Project, or experiment, that trackers list the run under."""
    push_to_hub: str | None = None
    """Hub id `user/name` that final/ goes up to when the run is done; needs a token that may write there."""
    hub_private: bool = False
    """Make that repository a private one, if the run is what makes it."""
    report: bool = True
    """Write report.html when the run ends, as `python -m rlhf_accel report` does at any time; needs matplotlib."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelConfig:
    name_or_path: str = "gpt2"
    """Policy: a hub id, a local folder, or `wheel:SmolLM2-135M-Instruct`, which a package-index wheel carries."""
    critic: Literal["head", "adapter", "separate"] = "head"
    """`head`: a scalar head on the policy's trunk; `adapter`, with lora.r above 0: a second adapter and a head on the
    same frozen base; `separate`: a transformer of its own, with an adapter of its own where lora.r is above 0."""
    critic_init: Literal["policy", "reward"] = "policy"
    """Weights that the separate critic starts from: the policy's, or those of reward.model (same tokenizer needed)."""
    dtype: Dtype = "auto"
    """Dtype of the loaded weights; auto is fp32 for full fine-tuning, and for LoRA the frozen base is bf16 where the
    device computes in it, else fp32."""
    load_in_4bit: bool = False
    """With lora.r above 0: the frozen base in 4 bits, NF4 with double quantisation (QLoRA, Dettmers et al. 2023); needs
    a CUDA GPU and bitsandbytes, `pip install 'rlhf_accel[qlora]'`."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    trust_remote_code: bool = False
    """Run code that comes with the policy, the reward model or their tokenizers; only for sources you trust."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class LoraConfig:
    r: NonNegativeInt = 0
    """Rank of the adapters; 0 is full fine-tuning."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout of the adapters' inputs while learning; above 0 the first ratio is no longer 1, and the masks, which are
    torch's, depend on the number of processes."""
    target_modules: Strings | None = None
    """Names of the layers that get adapters, or `all-linear`, which leaves routers out; by default what peft knows for
    the architecture, and where it knows none all linear layers but experts and routers."""
    modules_to_save: Strings = ()
    """Names of layers of the policy that learn in full beside the adapters."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead (rank-stabilised LoRA, Kalajdzievski 2023)."""
    use_dora: bool = False
    """Learn magnitude and direction apart (DoRA, Liu et al. 2024); slower, and not with ZeRO-3."""
    adapter: str | None = None
    """Adapter folder or hub id to go on from: the run starts from it, and it is the reference. Its shape is its own;
    lora.r has to agree."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    source: str = "embedded:movie_reviews"
    """`embedded:movie_reviews`, a .jsonl, .csv, .parquet or .txt file, or a hub id."""
    split: str = "train"
    """Split that prompts are drawn from; a file has none but `train`."""
    eval_split: str | None = None
    """Split of the held-out prompts; by default a fixed tenth of data.split, which training leaves out.
    For a file, the name of another file, which a data set with splits may take too."""
    text_field: str = "text"
    """Column that holds the text; the other columns reach the reward function, as the file has them. A CSV file says no
    types: a column of it is numbers (or truth values) if each is written as Python writes it, 7 or 0.5 or True, else
    texts, as 007 and 0.50 are; an empty cell is None."""
    max_samples: PositiveInt | None = None
    """Use only the first this many rows of the split."""
    prompt_tokens: tuple[PositiveInt, PositiveInt] | None = None
    """The prompt is the first n tokens of a text, n drawn from this range for each; by default the whole text."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RolloutConfig:
    batch_size: PositiveInt = 64
    """Prompts of one PPO step, over all processes."""
    max_prompt_tokens: PositiveInt = 64
    """Longest prompt in tokens, those that a tokenizer puts before every text (BOS) not counted; rows with a longer
    one are left out, and their number is said."""
    max_new_tokens: PositiveInt = 32
    """Longest response in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """The tokenizer's end-of-text token and stop tokens are not sampled before this many tokens."""
    temperature: Positive = 1.0
    """Divides the logits, in sampling and in learning alike."""
    top_k: NonNegativeInt = 0
    """Sample among the k likeliest tokens only; 0 is all. Learning scores the untruncated policy."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Sample among the likeliest tokens that hold this probability; 1 is all. Learning as for top_k."""
    stop: Strings = ()
    """Texts that end a response (they belong to it, and lie in it as a whole); one that is an added token of the
    tokenizer, such as <|eot_id|>, is matched as a token. The tokenizer's end-of-text token always ends a response."""
    gather_parameters: Literal["auto", "always", "never"] = "auto"
    """ZeRO-3: gather all parameters once for a rollout instead of layer by layer; auto does it where they fit."""
    forward_batch_size: PositiveInt = 64
    """Responses sampled at once on a process; a memory matter only."""
    logprobs: Literal["auto", "sampled", "recomputed"] = "auto"
    """Where the log-probabilities that the update's ratio starts from come from, and entropy and values: from sampling
    itself, or from another forward pass; auto is sampled where arithmetic is fp32, for there both agree but for
    rounding."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardConfig:
    model: str | None = None
    """Sequence classifier: a hub id, a local folder, or `embedded:movie_reviews`, trained on first use."""
    label: str | None = None
    """Name (or number) of the label whose score counts; must be empty for a model with one output."""
    output: Literal["logit", "probability"] = "logit"
    """Score a text by the label's logit or by its probability."""
    text: Literal["full", "response"] = "full"
    """What the classifier reads: prompt and response, or the response alone."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """How the classifier's text is formed: prompt and response as they are, or as a turn of the user and one of the
    assistant by its own chat template; auto is what its training recorded beside it, and plain where nothing is."""
    chat_field: str | None = None
    """With the format chat: column of the data that holds the prompt for it, a text or a list of {role, content}; by
    default it is the prompt that the policy reads, which then must be plain text."""
    dtype: Dtype = "auto"
    """Dtype of the frozen classifier; auto is fp16 on a GPU, but bf16 for a model that is stored or was trained in
    bf16; on a CPU bf16 if it has bf16 units, else fp32."""
    batch_size: PositiveInt = 64
    """Texts that the classifier reads at once; a memory matter only."""
    url: str | None = None
    """Address of a reward server: POST of `{"prompts", "responses", "columns"}` in JSON, answer `{"scores": [...]}`.
    A token for it goes into the environment variable RLHF_ACCEL_REWARD_TOKEN, never into a config."""
    function: Strings = ()
    """Import path(s) `package.module:callable` of `(prompts, responses, **columns) -> list[float]`."""
    import_from: str | None = None
    """Folder that reward.function and reward.gold are imported from, beside PYTHONPATH; by default the working folder,
    which the run's config.yaml keeps."""
    gold: Strings = ()
    """Import path(s) of functions like reward.function that evaluations measure beside the reward and training never
    sees, so that a policy which learns the reward's weaknesses shows; neither weighted, calibrated nor clipped."""
    weights: Floats | None = None
    """Weights of the sum over reward.model, reward.url and reward.function, those given, in this order; by default all
    1."""
    timeout: Positive | None = None
    """Seconds that a call of reward.url or reward.function may take; by default 60 for the former, for ever for the
    latter."""
    retries: Annotated[Count, Field(ge=0, le=20)] = 2
    """Times that a failed call of reward.url or reward.function is tried again before the run stops."""
    retry_wait: Positive = 1.0
    """Seconds before the first such retry; doubles with each."""
    calibrate: bool = False
    """Shift and scale scores to mean 0 and variance 1 on samples of the reference, drawn before step 1."""
    calibrate_samples: Annotated[Count, Field(ge=2)] = 128
    """Reference samples that the calibration reads."""
    clip: Positive | None = None
    """Clip scores (after calibration) to [-clip, clip]."""
    partial_every: NonNegativeInt = 0
    """Score each response also as it stands before its first token and after every so many, and let the critic learn
    only what the rest of it adds: advantages get less noisy, and no optimum moves (potential-based shaping, Ng et al.
    1999). The reward reads up to rollout.max_new_tokens / partial_every more texts a response, rounded
    up; 0 leaves it out."""
    missing_eos_penalty: NonNegative = 0.0
    """Taken from the score of a response that was cut off at rollout.max_new_tokens."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class PPOConfig:
    ppo_epochs: PositiveInt = 4
    """Passes over each batch of rollouts."""
    num_minibatches: PositiveInt = 1
    """Optimizer steps in each pass; must divide rollout.batch_size."""
    micro_batch_tokens: PositiveInt = 8192
    """Prompt and response tokens, padding included, of one forward and backward pass, and of a pass of the reference or
    a critic of its own; a memory matter only."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    cliprange: Positive = 0.2
    """The probability ratio is clipped to [1 - cliprange, 1 + cliprange]."""
    cliprange_value: Positive | None = 0.2
    """New values stay this close to the old ones in the clipped value loss; null does not clip."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegative = 0.05
    """Weight of the KL to the reference in the reward, per nat; with kl_target its first value."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of that KL (Schulman, "Approximating KL divergence", 2020). Only k1 may be in the reward: k2
    and k3 there drive the policy away from the reference."""
    kl_target: Positive | None = None
    """Adapt kl_coef towards this many nats per response; null keeps it fixed."""
    kl_horizon: Positive = 10_000.0
    """Episodes over which the adaptive coefficient may change by a factor of about e^0.2."""
    whiten_rewards: bool = False
    """Divide the per-token rewards by their standard deviation in the batch."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the tokens of the batch."""
    target_kl_stop: Positive | None = None
    """Skip the rest of a step's updates once the policy moved this many nats per token from where it sampled."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class OptimConfig:
    lr: Positive = 1e-5
    """Peak learning rate of AdamW."""
    critic_lr: Positive | None = None
    """Learning rate of the critic's own parameters; by default that of the policy."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW, on matrices only."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's running mean and running square."""
    eps: Positive = 1e-8
    """Added to the root of the running square, so that AdamW never divides by 0."""
    max_grad_norm: Positive | None = 1.0
    """Clip the norm of the gradient of policy and critic together; null does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate over the run, after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """PPO steps over which the learning rate rises from 0."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Config:
    """A PPO run. Contradictions between keys are refused: with a `ConfigError` by `load` and `parse`, with pydantic's
    `ValidationError`, a `ValueError` too, when the class is called."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        for contradiction in _contradictions(self):
            raise contradiction


@dataclass(frozen=True, kw_only=True)
class BatchSizes:
    """Sizes derived from the config. `rollout` responses a step are cut into `num_minibatches` of `minibatch`."""

    rollout: int
    minibatch: int
    updates_per_step: int

    @classmethod
    def of(cls, config: Config) -> BatchSizes:
        batch_size, minibatches = config.rollout.batch_size, config.ppo.num_minibatches
        return cls(
            rollout=batch_size,
            minibatch=batch_size // minibatches,
            updates_per_step=config.ppo.ppo_epochs * minibatches,
        )


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardDataConfig:
    source: str = "embedded:movie_reviews"
    """`embedded:movie_reviews`, a .jsonl, .csv or .parquet file, or a hub id."""
    objective: Literal["ratings", "labels", "pairs"] = "ratings"
    """What the data says of texts and the model learns: a number for each (squared error); one of several classes
    (cross entropy); which of two is preferred (Bradley and Terry 1952: the difference of their scores is the log-odds).
    From `embedded:movie_reviews`: the mean rating, its sign, and pairs of texts drawn from the mean ratings."""
    split: str = "train"
    """Split to learn from."""
    eval_split: str = "heldout"
    """Split that the reported figures come from; a file keeps a tenth back, or this is the name of another file."""
    tuning_split: str | None = None
    """Split or file that chooses the best checkpoint and the temperature of the calibration; by default, and
    for a file unless this names another one, half of the held-out data, which the figures then leave out."""
    text_field: str = "text"
    """Ratings and labels: column that holds the text."""
    target_field: str = "rating"
    """Ratings and labels: column with the number to predict, such as the mean rating, or with the label."""
    pair_fields: tuple[str, str] = ("chosen", "rejected")
    """Pairs: the two columns of texts, the preferred one first. A conversation, a list of {role, content}, is laid out
    by the tokenizer's chat template."""
    choice_field: str | None = None
    """Pairs: column that says which one is preferred, where it is not always the first: 0 for the first and 1 for the
    second of data.pair_fields, or the column's name."""
    margin_field: str | None = None
    """Pairs: column with the log-odds, 0 or more, by which the preferred text has to win (Touvron et al. 2023, "Llama
    2", section 3.2.2)."""
    max_samples: PositiveInt | None = None
    """Use only the first this many rows of each split."""
    max_tokens: PositiveInt = 128
    """Longer texts are cut, as are those that are longer than the model can read."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardOptimConfig:
    lr: Positive = 5e-5
    """Peak learning rate of AdamW; falls linearly to 0."""
    epochs: Positive = 1.0
    """Passes over the training split; a part of one is allowed."""
    batch_size: PositiveInt = 32
    """Texts, or pairs of texts, of one optimizer step, on one process."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay of AdamW."""
    warmup_ratio: BelowOne = 0.1
    """Share of the steps over which the learning rate rises from 0."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardRunConfig:
    seed: NonNegativeInt = 0
    """Root of all randomness: the new head's weights, dropout and the order of the texts."""
    output_dir: str | None = None
    """Folder that the model is written to, which reward.model takes; by default saved_models/NAME."""
    name: str = "reward"
    """Name of the model's default folder."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 where the device computes in it, else fp32."""
    eval_every: NonNegative = 0.25
    """Optimizer steps between evaluations, below 1 a share of all steps; the best of the models evaluated is written.
    0 evaluates none and writes the last."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardModelConfig:
    name_or_path: str = "wheel:all-MiniLM-L6-v2"
    """Model to start from, an encoder or a decoder: a hub id, a local folder, or a model that a package-index wheel
    carries."""
    head_init: Literal["ziegler", "library"] = "ziegler"
    """A new head with one output: normal with a standard deviation of 1 / sqrt(width + 1) and no bias (Ziegler et al.
    2019, section 2.1; Huang et al. 2024), or as transformers makes it. Heads of more outputs are always the latter."""
    normalize: Literal["auto", "none", "mean", "standard"] = "auto"
    """Pairs: shift and scale scores to mean 0, or to mean 0 and variance 1, over texts that were learned from; auto is
    `standard`. A head without a bias is scaled only. Ratings and labels keep their scale: auto is `none`."""
    trust_remote_code: bool = False
    """Run code that comes with the model or its tokenizer; only for sources you trust."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardLoraConfig:
    r: NonNegativeInt = 0
    """Rank of the adapters, which are added into the weights at the end; 0 trains all weights. The head always learns
    in full."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout of the adapters' inputs while learning."""
    target_modules: Strings | None = None
    """Names of the layers that get adapters, or `all-linear`, which leaves routers out; by default what peft knows for
    the architecture, and where it knows none all linear layers but experts and routers."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class RewardTrainingConfig:
    """Training of a reward model from human feedback."""

    run: RewardRunConfig = RewardRunConfig()
    model: RewardModelConfig = RewardModelConfig()
    lora: RewardLoraConfig = RewardLoraConfig()
    data: RewardDataConfig = RewardDataConfig()
    optim: RewardOptimConfig = RewardOptimConfig()

    def __post_init__(self) -> None:
        for contradiction in _reward_contradictions(self):
            raise contradiction


def _reward_contradictions(config: RewardTrainingConfig) -> Iterator[ConfigError]:
    run, data, model = config.run, config.data, config.model
    if data.eval_split in (data.split, data.source):
        yield ConfigError(
            f"data.eval_split={data.eval_split} is what training reads; name another", key="data.eval_split"
        )
    if data.tuning_split is not None and data.tuning_split in (data.split, data.source, data.eval_split):
        yield ConfigError(
            f"data.tuning_split={data.tuning_split} is what training or the report reads; name another, or remove it "
            "for half of data.eval_split",
            key="data.tuning_split",
            others=("data.eval_split",),
        )
    if run.eval_every > 1 and run.eval_every != int(run.eval_every):
        yield ConfigError(
            f"run.eval_every={run.eval_every:g} is no number of steps; use a whole one, or a share below 1",
            key="run.eval_every",
        )
    if data.objective != "pairs":
        given = [key for key in ("choice_field", "margin_field") if getattr(data, key) is not None]
        if given:
            yield ConfigError(
                f"data.{given[0]} is set, which is for pairs; remove it, or set data.objective=pairs",
                key=f"data.{given[0]}",
                others=("data.objective",),
            )
        if model.normalize not in ("auto", "none"):
            yield ConfigError(
                f"model.normalize={model.normalize} would change what the scores of data.objective={data.objective} "
                "mean; remove it",
                key="model.normalize",
                others=("data.objective",),
            )
    elif data.source.startswith("embedded:") and (data.choice_field or data.margin_field):
        yield ConfigError(
            f"data.choice_field and data.margin_field are not in {data.source}; remove them",
            key="data.choice_field",
            others=("data.margin_field", "data.source"),
        )
    if data.pair_fields[0] == data.pair_fields[1]:
        yield ConfigError(
            f"data.pair_fields={list(data.pair_fields)} names one column twice; name two", key="data.pair_fields"
        )


C = TypeVar("C")


def load(cls: type[C], source: str | Path | None = None, overrides: Sequence[str] = ()) -> C:
    """A config of type `cls` from a recipe's name or a YAML file, with `--section.key value` overrides on top.

    Raises `ConfigError` naming the key for an unknown key, a wrong type, a value out of range, a contradiction or what
    `check_trainable` refuses.
    """
    return parse(cls, read_tree(cls, source, overrides))


def load_run(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The config.yaml that a run wrote, to look at the run or to compare with: what an older version trained with may
    stand in it. Raises `ConfigError` as `load` does for everything else."""
    return parse(Config, read_tree(Config, path, overrides), to_train=False)


def check_trainable(config: Config) -> None:
    """Raises `ConfigError` for what older versions trained with and no run may, as it gives wrong results.

    As a reward an estimator c(y) has the gradient E[c grad log pi], not that of its mean. For k1 the two are equal. For
    k3 it is grad KL(pi || ref) - grad KL(ref || pi), for k2 that of log-ratios squared, whatever their sign: near the
    reference both vanish to first order, so nothing pulls back, and what is left pushes away (arXiv 2512.21852).
    """
    ppo = config.ppo
    if ppo.kl_estimator != "k1" and ppo.kl_coef > 0:
        raise ConfigError(
            f"ppo.kl_estimator={ppo.kl_estimator} in the reward drives the policy away from the reference (its "
            "gradient is not that of the KL; arXiv 2512.21852); set ppo.kl_estimator=k1, and to resume a run of an "
            "older version with it, run.changes=[ppo.kl_estimator]",
            key="ppo.kl_estimator",
            found=ppo.kl_estimator,
            expected="k1",
        )


def read_tree(cls: Any, source: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What `load` parses: the mapping in the source with the overrides on top, whose keys are known. Raises
    `ConfigError`."""
    tree = read_yaml(source) if source is not None else {}
    for key, value in parse_overrides(overrides):
        _set(tree, key, value, cls)
    return tree


def from_command_line(cls: type[C], arguments: Sequence[str], default: str) -> C:
    """A config from `[--config RECIPE_OR_FILE] [--section.key value …]`.

    `--print_config` prints the resolved config and `--help` the keys, and both exit with status 0. Raises `ConfigError`
    as `load` does.
    """
    rest = list(arguments)
    if "-h" in rest or "--help" in rest:
        say(f"options: --config RECIPE_OR_FILE (default {default}), --print_config, and any of\n\n{describe(cls)}")
        sys.exit(0)
    print_config = "--print_config" in rest
    rest = [argument for argument in rest if argument != "--print_config"]
    source = take_option(rest, "config", "RECIPE_OR_FILE") or default
    config = load(cls, source, rest)
    if print_config:
        say(to_yaml(config), end="")
        sys.exit(0)
    return config


def take_option(arguments: list[str], name: str, value: str) -> str | None:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments; None if it is not there.

    Raises `ConfigError` if it has no value, which the error calls `value`, or stands there twice.
    """
    places = [i for i, argument in enumerate(arguments) if argument.partition("=")[0] == f"--{name}"]
    if len(places) > 1:
        raise ConfigError(f"--{name} is given more than once; keep one of them", key=f"--{name}")
    if not places:
        return None
    i = places[0]
    _, equals, said = arguments[i].partition("=")
    if not equals:
        said = "".join(arguments[i + 1 : i + 2])
    if not said or (not equals and said.startswith("--")):
        raise ConfigError(f"--{name} needs a value: --{name} {value}", key=f"--{name}")
    del arguments[i : i + (1 if equals else 2)]
    return said


def describe(cls: Any, prefix: str = "") -> str:
    """Every key of a config class with its default and its doc line."""
    hints = get_type_hints(cls)
    lines = []
    for field in fields(cls):
        if is_dataclass(hints[field.name]):
            lines.append(describe(hints[field.name], f"{prefix}{field.name}."))
        else:
            info = cls.__pydantic_fields__[field.name]
            doc = f"  {' '.join(info.description.split())}" if info.description else ""
            lines.append(f"--{prefix}{field.name} ({_short(info.default)}){doc}")
    return "\n".join(lines)


def parse(cls: type[C], tree: Mapping[str, Any], *, to_train: bool = True) -> C:
    """The mapping as a checked config; raises `ConfigError` on the first thing that is wrong. Without `to_train`,
    `check_trainable` is left out."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"expected a mapping of sections, found {_short(tree)}")
    _refuse_unknown_keys(cls, tree, "", key_names(cls))
    try:
        config = TypeAdapter(cls).validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        contradiction = first.get("ctx", {}).get("error")
        if isinstance(contradiction, ConfigError):
            raise contradiction from None
        key = ".".join(str(part) for part in first["loc"] if isinstance(part, str) and "[" not in part)
        raise ConfigError(f"{key}={_short(first['input'])}: {_message(first)}", key=key) from None
    if to_train and isinstance(config, Config):
        check_trainable(config)
    return config


def to_yaml(config: Any) -> str:
    """The resolved config as YAML that `load` reads back."""
    tree = _plain(asdict(config))
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    # PyYAML leaves U+0085 as it is, and reads it back as a space, and a console shows other control characters as their
    # codes: in ASCII both are escaped so that they are read back.
    return text if visible(text) == text else yaml.safe_dump(tree, sort_keys=False)


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def read_yaml(source: str | Path) -> dict[str, Any]:
    """The mapping in a recipe (by name) or a YAML file (by path); raises `ConfigError` if there is none."""
    path = RECIPES / f"{source}.yaml" if str(source) in recipe_names() else Path(source)
    try:
        text = _read_text(path)
    except FileNotFoundError:
        raise ConfigError(
            f"--config {source}: neither a file nor a recipe; recipes are {', '.join(recipe_names())}", key="--config"
        ) from None
    except OSError as error:
        raise ConfigError(f"--config {source}: cannot be read ({error.strerror})", key="--config") from None
    except ValueError as error:  # not UTF-8, or a name that no file can have
        raise ConfigError(f"--config {source}: not a text file ({error})", key="--config") from None
    try:
        tree = parse_yaml(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" (line {where.line + 1})" if where else ""
        raise ConfigError(
            f"--config {source}: not valid YAML{line}; {getattr(error, 'problem', error)}", key="--config"
        ) from None
    if tree is None:
        raise ConfigError(f"--config {source}: the file is empty", key="--config")
    if not isinstance(tree, dict):
        raise ConfigError(
            f"--config {source}: expected a mapping of sections, found {type(tree).__name__}", key="--config"
        )
    return tree


def _read_text(path: Path) -> str:
    """Of a file, or of a pipe that the shell made; of a device without end only so much."""
    if stat.S_ISFIFO(path.stat().st_mode) and not str(path).startswith(("/dev/", "/proc/")):
        raise files.Malformed("a pipe, which nobody may write to")
    with path.open("rb") as file:
        content = file.read(_MOST_YAML + 1)
    return files.whole(content, _MOST_YAML).decode("utf-8")


def parse_yaml(text: str) -> Any:
    """The tree in a YAML text. Raises `yaml.YAMLError` for whatever is wrong, also for aliases without end."""
    try:
        return files.bounded(_safe_load(text), _MOST_YAML_PARTS)
    except files.Malformed as error:
        raise yaml.YAMLError(str(error)) from error


def parse_overrides(arguments: Sequence[str]) -> list[tuple[str, Any]]:
    """`--a.b 1`, `--a.b=1` -> [("a.b", 1), …]; values are read as YAML. Raises `ConfigError` on anything else.

    >>> parse_overrides(["--optim.lr", "3e-4", "--rollout.stop=['.', '!']"])
    [('optim.lr', '3e-4'), ('rollout.stop', ['.', '!'])]
    """
    pairs = []
    rest = list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or len(flag) < 3:
            raise ConfigError(f"unexpected argument {flag!r}; overrides look like --section.key value", key=flag)
        key, equals, value = flag[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value: --{key} VALUE", key=f"--{key}")
            value = rest.pop(0)
        try:
            pairs.append((key, parse_yaml(value)))
        except yaml.YAMLError:
            pairs.append((key, value))
    return pairs


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys whose values differ, but for those that may, each as `key (was X, is Y)`."""
    allowed = MAY_CHANGE | set(now.run.changes)
    was, is_now = flatten(asdict(before)), flatten(asdict(now))
    return [
        f"{key} (was {_short(was[key])}, is {_short(is_now[key])})"
        for key in key_names(Config)
        if key not in allowed and was[key] != is_now[key] and not (key in _PATHS and _leads_to(was[key], is_now[key]))
    ]


def _leads_to(relative: str | None, path: str | None) -> bool:
    """Whether a relative path, from whatever folder it was given, may be this absolute one.

    >>> _leads_to("./models/a", "/home/me/models/a"), _leads_to("a", "/home/me/models/b"), _leads_to("/a", "/b/a")
    (True, False, False)
    """
    if relative is None or path is None or Path(relative).is_absolute() or not Path(path).is_absolute():
        return False
    parts = [part for part in Path(relative).parts if part != ".."]
    return bool(parts) and list(Path(path).parts[-len(parts) :]) == parts


def for_a_look(config: Config, place: Path) -> Config:
    """The config for setting the run up again without training it: a new run that tells no tracker and no hub, in a
    folder that is not made, without what only training needs."""
    run = replace(config.run, resume=None, changes=(), trackers=(), push_to_hub=None, output_dir=str(place))
    reward, ppo = replace(config.reward, partial_every=0), replace(config.ppo, kl_estimator="k1")
    return replace(config, run=run, model=replace(config.model, critic_init="policy"), reward=reward, ppo=ppo)


def gold_name(target: str) -> str:
    """What the figures of a gold reward go by: the callable's name.

    >>> gold_name("rlhf_accel.reward:vader")
    'vader'
    """
    return target.rpartition(":")[2]


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys.

    >>> flatten({"run": {"seed": 0, "name": "a"}})
    {'run.seed': 0, 'run.name': 'a'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def key_names(cls: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a config class.

    >>> key_names(Config)[:2]
    ['run.seed', 'run.output_dir']
    """
    names = []
    hints = get_type_hints(cls)
    for field in fields(cls):
        kind = hints[field.name]
        names += key_names(kind, f"{prefix}{field.name}.") if is_dataclass(kind) else [prefix + field.name]
    return names


def _contradictions(config: Config) -> Iterator[ConfigError]:
    run, data, rollout, ppo = config.run, config.data, config.rollout, config.ppo
    if rollout.batch_size % ppo.num_minibatches:
        yield ConfigError(
            f"ppo.num_minibatches={ppo.num_minibatches} does not divide rollout.batch_size={rollout.batch_size}; "
            "choose a divisor",
            key="ppo.num_minibatches",
            others=("rollout.batch_size",),
        )
    if rollout.min_new_tokens > rollout.max_new_tokens:
        yield ConfigError(
            f"rollout.min_new_tokens={rollout.min_new_tokens} is above "
            f"rollout.max_new_tokens={rollout.max_new_tokens}; lower it",
            key="rollout.min_new_tokens",
            others=("rollout.max_new_tokens",),
        )
    if not run.project.strip(". ") or set(run.project) & set("/\\#?%:"):
        yield ConfigError(
            f"run.project={_short(run.project)} is no name for trackers; use none of / \\ # ? % :",
            key="run.project",
        )
    if not all(rollout.stop):
        yield ConfigError(
            "rollout.stop holds an empty text, which every response contains; remove it", key="rollout.stop"
        )
    if data.eval_split is not None and data.eval_split in (data.split, data.source):
        yield ConfigError(
            f"data.eval_split={data.eval_split} is what training reads; name another, or leave it out to hold out a "
            "tenth of data.split",
            key="data.eval_split",
            others=("data.split",),
        )
    if data.prompt_tokens is not None:
        low, high = data.prompt_tokens
        if low > high:
            yield ConfigError(
                f"data.prompt_tokens=[{low}, {high}] is not a range; put the smaller number first",
                key="data.prompt_tokens",
            )
        if high > rollout.max_prompt_tokens:
            yield ConfigError(
                f"data.prompt_tokens=[{low}, {high}] goes above rollout.max_prompt_tokens="
                f"{rollout.max_prompt_tokens}; raise the latter",
                key="data.prompt_tokens",
                others=("rollout.max_prompt_tokens",),
            )
    yield from _scoring_contradictions(config)
    yield from _model_contradictions(config)
    if rollout.max_prompt_tokens + rollout.max_new_tokens > ppo.micro_batch_tokens:
        yield ConfigError(
            f"ppo.micro_batch_tokens={ppo.micro_batch_tokens} is below one sample's rollout.max_prompt_tokens + "
            f"rollout.max_new_tokens={rollout.max_prompt_tokens + rollout.max_new_tokens}; raise it",
            key="ppo.micro_batch_tokens",
            others=("rollout.max_prompt_tokens", "rollout.max_new_tokens"),
        )
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        yield ConfigError(
            "ppo.kl_target is set and ppo.kl_coef=0, which could never rise; set ppo.kl_coef above 0",
            key="ppo.kl_target",
            others=("ppo.kl_coef",),
        )
    # The controller changes its coefficient by at most 0.2 x batch / horizon of it, which has to stay below all of it.
    if ppo.kl_target is not None and ppo.kl_horizon <= 0.2 * rollout.batch_size:
        yield ConfigError(
            f"ppo.kl_horizon={ppo.kl_horizon:g} could turn the coefficient to 0 in a step of rollout.batch_size="
            f"{rollout.batch_size}; raise it above {0.2 * rollout.batch_size:g}",
            key="ppo.kl_horizon",
            others=("rollout.batch_size",),
        )
    if run.resume in ("latest", "auto") and run.output_dir is None:
        yield ConfigError(
            f"run.resume={run.resume} needs run.output_dir, the folder of the run to go on with",
            key="run.resume",
            others=("run.output_dir",),
        )
    for key in run.changes:
        if key not in key_names(Config):
            yield ConfigError(f"run.changes: {_unknown(key, key_names(Config))}", key="run.changes")


def _scoring_contradictions(config: Config) -> Iterator[ConfigError]:
    reward = config.reward
    terms = (reward.model is not None) + (reward.url is not None) + len(reward.function)
    if reward.weights is not None and len(reward.weights) != terms:
        yield ConfigError(
            f"reward.weights has {len(reward.weights)} numbers for {terms} rewards (reward.model, reward.url and "
            "reward.function); give one for each",
            key="reward.weights",
            others=("reward.model", "reward.url", "reward.function"),
        )
    if reward.url is not None:
        yield from _url_problems(reward.url)
    yield from _gold_problems(reward)
    patience = (reward.timeout or 0.0) * (reward.retries + 1) + reward.retry_wait * (2**reward.retries - 1)
    if reward.timeout is not None and patience >= config.run.collective_timeout:
        yield ConfigError(
            f"reward.timeout={reward.timeout:g} with reward.retries={reward.retries} may take {patience:g} s, and "
            f"others wait for run.collective_timeout={config.run.collective_timeout:g} s; raise the latter",
            key="reward.timeout",
            others=("reward.retries", "run.collective_timeout"),
        )
    if reward.partial_every and config.ppo.whiten_rewards:
        yield ConfigError(
            f"reward.partial_every={reward.partial_every} needs rewards in the unit of the scores, and "
            "ppo.whiten_rewards=true scales them; leave the latter out (reward.calibrate=true scales scores), or set "
            "the former to 0",
            key="reward.partial_every",
            others=("ppo.whiten_rewards",),
        )
    if reward.model is None and reward.label is not None:
        yield ConfigError(
            "reward.label is set without reward.model; name the model or remove the label",
            key="reward.label",
            others=("reward.model",),
        )
    if reward.model is None and reward.format != "auto":
        yield ConfigError(
            f"reward.format={reward.format} is set without reward.model; name the model or remove the format",
            key="reward.format",
            others=("reward.model",),
        )
    if reward.model is None and reward.chat_field is not None:
        yield ConfigError(
            "reward.chat_field is set without reward.model; name the model or remove the field",
            key="reward.chat_field",
            others=("reward.model",),
        )
    if reward.format == "plain" and reward.chat_field is not None:
        yield ConfigError(
            "reward.chat_field is set, and reward.format=plain reads no turns; remove one of them",
            key="reward.chat_field",
            others=("reward.format",),
        )


def _gold_problems(reward: RewardConfig) -> Iterator[ConfigError]:
    names = [gold_name(target) for target in reward.gold]
    for name in names:
        if names.count(name) > 1:
            yield ConfigError(
                f"reward.gold names {name} twice; figures go by the callable's name, so rename one or remove it",
                key="reward.gold",
            )
    for target in reward.gold:
        if target in reward.function:
            yield ConfigError(
                f"reward.gold={target} is also in reward.function, and training must not see it; remove one of them",
                key="reward.gold",
                others=("reward.function",),
            )


def _url_problems(url: str) -> Iterator[ConfigError]:
    """Only the server's name is repeated: what stands before or behind it may be a secret."""
    expected = "expected http://HOST:PORT/PATH or https://…"
    try:
        parts = urlsplit(url)
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        yield ConfigError(f"reward.url is not an address; {expected}", key="reward.url")
        return
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_is_one:
        yield ConfigError(f"reward.url is not an address; {expected}", key="reward.url")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        yield ConfigError(
            f"reward.url to {parts.hostname} holds more than scheme, host, port and path, and config.yaml would keep "
            "it; put a secret into the environment variable RLHF_ACCEL_REWARD_TOKEN",
            key="reward.url",
        )


def _model_contradictions(config: Config) -> Iterator[ConfigError]:
    model, lora = config.model, config.lora
    if model.critic_init == "reward" and (model.critic != "separate" or config.reward.model is None):
        yield ConfigError(
            "model.critic_init=reward needs model.critic=separate and reward.model",
            key="model.critic_init",
            others=("model.critic", "reward.model"),
        )
    if lora.modules_to_save and model.dtype in ("bf16", "fp16"):
        yield ConfigError(
            f"lora.modules_to_save learn in full, and in model.dtype={model.dtype} would lose small updates to "
            "rounding; use model.dtype=fp32 with run.precision=bf16",
            key="lora.modules_to_save",
            others=("model.dtype",),
        )
    if model.critic == "adapter" and lora.r == 0:
        yield ConfigError(
            "model.critic=adapter is a second LoRA adapter; set lora.r above 0, or use head or separate",
            key="model.critic",
            others=("lora.r",),
        )
    if model.load_in_4bit and lora.r == 0:
        yield ConfigError(
            "model.load_in_4bit=true freezes the weights; set lora.r above 0 to train adapters on them",
            key="model.load_in_4bit",
            others=("lora.r",),
        )
    if model.load_in_4bit and model.critic == "separate":
        yield ConfigError(
            "model.load_in_4bit=true holds one base; use model.critic=adapter or head",
            key="model.load_in_4bit",
            others=("model.critic",),
        )
    unused = [key for key in ("modules_to_save", "use_rslora", "use_dora") if getattr(lora, key)]
    if lora.r == 0 and unused:
        yield ConfigError(
            f"lora.{unused[0]} is set and lora.r=0 is full fine-tuning; set lora.r above 0",
            key=f"lora.{unused[0]}",
            others=("lora.r",),
        )
    if lora.adapter is not None and lora.r == 0:
        yield ConfigError(
            "lora.adapter is set and lora.r=0 is full fine-tuning; set lora.r to the adapter's rank",
            key="lora.adapter",
            others=("lora.r",),
        )
    if lora.adapter is not None and lora.modules_to_save:
        yield ConfigError(
            "lora.modules_to_save is set beside lora.adapter, which brings its own; remove the former",
            key="lora.modules_to_save",
            others=("lora.adapter",),
        )
    if lora.r == 0 and model.dtype in ("bf16", "fp16"):
        yield ConfigError(
            f"model.dtype={model.dtype} with lora.r=0 would lose small updates to rounding; "
            "use model.dtype=fp32 with run.precision=bf16, or lora.r above 0",
            key="model.dtype",
            others=("lora.r",),
        )


def _refuse_unknown_keys(cls: Any, tree: Mapping[Any, Any], prefix: str, known: Sequence[str]) -> None:
    """`known` are all dotted keys of the whole config: a key may stand in the wrong section."""
    hints = get_type_hints(cls)
    names = [field.name for field in fields(cls)]
    for key, value in tree.items():
        if key not in names:
            raise ConfigError(_unknown(f"{prefix}{key}", known), key=f"{prefix}{key}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{prefix}{key}: expected a mapping of keys, found {_short(value)}", key=f"{prefix}{key}"
                )
            _refuse_unknown_keys(hints[key], value, f"{prefix}{key}.", known)


def _set(tree: dict[str, Any], dotted: str, value: Any, cls: Any) -> None:
    known = key_names(cls)
    if dotted not in known:
        raise ConfigError(_unknown(dotted, known), key=dotted)
    *sections, key = dotted.split(".")
    for section in sections:
        below = tree.setdefault(section, {})
        if not isinstance(below, dict):
            raise ConfigError(f"{section}: expected a mapping of keys, found {_short(below)}", key=section)
        tree = below
    tree[key] = value


def _unknown(key: str, known: Sequence[str]) -> str:
    """The nearest keys: a slip of the pen first, then the right key in the wrong section, then whatever looks alike.

    The second comes before the third since `--lr` means optim.lr, though lora.r is spelt more like it.
    """
    sections = list(dict.fromkeys(name.partition(".")[0] for name in known))
    if key in sections:
        return f"{key} is a section; its keys are {', '.join(name for name in known if name.startswith(f'{key}.'))}"
    everything = [*sections, *known]
    nearest = difflib.get_close_matches(key, everything, n=1, cutoff=0.85)
    nearest = nearest or [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    nearest = nearest or difflib.get_close_matches(key, everything, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {', '.join(known)}"
    return f"unknown key {key}; {hint}"


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _safe_load(text: str) -> Any:
    """Raises `yaml.YAMLError` for whatever is wrong, also where PyYAML raises something else."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        # A date or a number that Python refuses, a tag that does not fit its value, brackets without end.
        raise yaml.YAMLError(str(error)) from error


def _message(error: Mapping[str, Any]) -> str:
    """What pydantic found, in the words of a YAML file."""
    if error["type"] == "missing":
        return "too few items"
    message: str = error["msg"].removeprefix("Value error, ").replace(" after validation", "")
    message = (message[0].lower() + message[1:]).replace("tuple", "list")
    if error["type"] in ("string_type", "tuple_type") and not isinstance(error["input"], (Mapping, list)):
        return f"{message}; put a text that YAML reads otherwise in quotes of its own"
    return message


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value
