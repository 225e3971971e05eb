"""The keys of a PPO run, as frozen dataclasses by section: types, ranges, defaults and a line of help for each.

Knows no file, and not which keys contradict each other (`rules` does).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rlhf_accel.config.rules import contradictions
from rlhf_accel.config.types import (
    STRICT,
    BelowOne,
    Count,
    Dtype,
    Floats,
    Fraction,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    PositiveInt,
    Strings,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    seed: NonNegativeInt = 0
    """Seed of the run. Prompts, sampling and minibatches derive from it, the step and the sample's index."""
    output_dir: str | None = None
    """Folder of the run; by default the first of saved_models/NAME, saved_models/NAME-2, … that does not exist."""
    name: str = "run"
    """Name of the run in its default folder, in trackers and in the model card."""
    total_steps: PositiveInt = 100
    """Number of PPO steps; each samples one batch of responses and updates the policy on it."""
    save_every: NonNegativeInt = 50
    """Steps between checkpoints; 0 writes one only when the run receives SIGTERM or SIGUSR1."""
    keep_checkpoints: NonNegativeInt = 2
    """Number of most recent checkpoints to keep; 0 keeps all."""
    checkpoint: Literal["sharded", "portable"] = "sharded"
    """Format of checkpoints under ZeRO. `sharded`: each process writes its part, and only the same launch can resume.
    `portable`: slower, but any launch can resume. Without ZeRO, checkpoints are always portable."""
    max_failed_saves: PositiveInt = 3
    """Number of consecutive checkpoints that may fail, for example because of a full disk, before the run stops."""
    max_skipped_steps: PositiveInt = 10
    """Number of consecutive steps that may be skipped because a score, a loss or a gradient is not finite, before the
    run stops."""
    eval_every: NonNegativeInt = 0
    """Steps between evaluations on held-out prompts; 0 evaluates only before the first step and after the last one."""
    eval_samples: NonNegativeInt = 256
    """Number of held-out prompts per evaluation, always the same ones with the same seeds; 0 turns evaluation off."""
    best_kl_budget: Positive | None = None
    """best/ holds the model with the best held-out score among the evaluations whose eval/kl is at most this many nats
    per response; null sets no limit."""
    sample_every: NonNegativeInt = 10
    """Steps between samples that are logged to the console and to samples.jsonl; 0 logs none."""
    sample_count: PositiveInt = 4
    """Number of samples that are logged each time."""
    resume: str | None = None
    """Checkpoint to resume from: a folder; `latest` for the newest complete one in run.output_dir; `auto` for the same,
    or to start a new run if there is none yet, so that a job can be restarted with the same command."""
    changes: Strings = ()
    """Keys that may differ from the checkpoint's config when resuming, such as `optim.lr`. Keys that change no result
    (steps, intervals, folders, trackers, memory) may always differ; others may not."""
    collective_timeout: Positive = 3600.0
    """Seconds that a process waits for the others before it reports which one is missing and the run ends."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the forward passes. bf16 is autocast over the weights as loaded; auto is fp32 on a CPU, and bf16 on
    a GPU that supports it."""
    matmul_precision: Literal["medium", "high", "highest"] = "medium"
    """Precision of fp32 matrix products, as in torch.set_float32_matmul_precision: medium allows bf16 on a CPU that
    supports it and TF32 on a GPU; highest is exact fp32. The precision that this device uses is printed at the start
    and written to environment.json."""
    fast_kernels: bool = True
    """On a CPU in fp32: use oneDNN's matrix products for the vocabulary layer and, with weights packed for each
    rollout, for sampling. Results change only by rounding."""
    trackers: Strings = ("tensorboard",)
    """Trackers as in Accelerate's `log_with`; metrics.jsonl is always written as well."""
    project: str = "rlhf_accel"
    """Name of the project, or experiment, of the run in trackers."""
    push_to_hub: str | None = None
    """Hub id `user/name` to which final/ is uploaded when the run is done; needs a token with write access."""
    hub_private: bool = False
    """If the run creates this repository, make it private."""
    report: bool = True
    """Write report.html when the run ends, as `rlhf-accel report` does at any time; needs matplotlib."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    name_or_path: str = "gpt2"
    """Policy: a hub id, a local folder, or `wheel:SmolLM2-135M-Instruct`, a model from a wheel of the package index."""
    critic: Literal["head", "adapter", "separate"] = "head"
    """Value model. `head`: a scalar head on the policy's trunk; `adapter`: a second adapter and a head on the same
    frozen base, with lora.r above 0; `separate`: its own transformer, with its own adapter if lora.r is above 0."""
    critic_init: Literal["policy", "reward"] = "policy"
    """Initial weights of a separate critic: those of the policy, or of reward.model, which must have the same
    tokenizer."""
    dtype: Dtype = "auto"
    """Dtype of the loaded weights. auto is fp32 for full fine-tuning; for LoRA, the frozen base is bf16 if the device
    computes in bf16, else fp32."""
    load_in_4bit: bool = False
    """With lora.r above 0: load the frozen base in 4 bits, NF4 with double quantisation (QLoRA, Dettmers et al. 2023);
    needs a CUDA GPU and bitsandbytes, `pip install 'rlhf_accel[qlora]'`."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] = "auto"
    """Attention of policy, critic and reference, as `attn_implementation` of transformers. auto is its choice, sdpa for
    most models; flash_attention_2 and flash_attention_3 need a CUDA GPU, half precision and their library."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass; saves memory for about a third more compute."""
    trust_remote_code: bool = False
    """Run code that comes with the policy, the reward model or their tokenizers; only for sources that you trust."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    r: NonNegativeInt = 0
    """Rank of the adapters; 0 is full fine-tuning."""
    alpha: Positive = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout on the adapters' inputs during the update. Above 0, the first ratio is no longer 1, and results depend on
    the number of processes."""
    target_modules: Strings | None = None
    """Names of the layers that get adapters, or `all-linear` for all linear layers except routers. By default, peft's
    choice for the architecture, or if it has none, all linear layers except experts and routers."""
    modules_to_save: Strings = ()
    """Names of layers of the policy that are fully trainable in addition to the adapters."""
    use_rslora: bool = False
    """Scale adapters by alpha / sqrt(r) instead (rank-stabilised LoRA, Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train magnitude and direction separately (DoRA, Liu et al. 2024); slower, and not supported with ZeRO-3."""
    adapter: str | None = None
    """Folder or hub id of an adapter to start from, which is also the reference. Its settings are its own, and lora.r
    must equal its rank."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    source: str = "embedded:movie_reviews"
    """`embedded:movie_reviews`, `embedded:arithmetic`, a .jsonl, .csv, .parquet or .txt file, or a hub id."""
    split: str = "train"
    """Split that prompts are drawn from; a file has only `train`."""
    eval_split: str | None = None
    """Split of the held-out prompts, or the name of another file; by default a fixed tenth of data.split, which is not
    used in training."""
    text_field: str = "text"
    """Column of the prompts: texts, or conversations with data.chat. If there is no column `text`, `prompt` is used.
    The other columns are passed to the reward function. A CSV file has no types: a column is
    read as numbers (or booleans) if each value is written as Python writes it, such as 7, 0.5 or True, and as texts
    otherwise, such as 007 or 0.50; an empty cell is None."""
    max_samples: PositiveInt | None = None
    """Use only the first rows of the split, at most this many."""
    prompt_tokens: tuple[PositiveInt, PositiveInt] | None = None
    """The prompt is the first n tokens of a text, with n drawn from this range for each text; by default the whole
    text."""
    chat: bool = False
    """Prompts are conversations, formatted by the policy's chat template with its generation prompt: a list of {role,
    content}, the same as JSON, or a text, which becomes one turn of the user. An answer at the end is left out."""
    system: str | None = None
    """With data.chat: system turn of all conversations; replaces their own."""
    chat_template: str | None = None
    """With data.chat: a Jinja template, or the name of its file, in place of the template of the policy's tokenizer."""
    thinking: bool | None = None
    """With data.chat: value of `enable_thinking` in a chat template that has it, such as Qwen 3's; null passes none."""


_AT_ONCE_ON_CPU = 64  # responses; more do not make a CPU faster


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig:
    batch_size: PositiveInt = 64
    """Number of prompts per PPO step, over all processes."""
    samples_per_prompt: PositiveInt = 1
    """Number of responses to each prompt. Those to one prompt are a group, which ppo.advantage may compare."""
    max_prompt_tokens: PositiveInt = 64
    """Length of the longest prompt in tokens, without those that the tokenizer adds before every text (BOS). Rows with
    a longer prompt are left out, and their number is printed."""
    max_new_tokens: PositiveInt = 32
    """Length of the longest response in tokens."""
    min_new_tokens: NonNegativeInt = 0
    """Number of tokens before which neither the tokenizer's end-of-text token nor a stop token is sampled."""
    temperature: Positive = 1.0
    """Temperature of the policy: divides the logits, both in sampling and in the update."""
    top_k: NonNegativeInt = 0
    """Sample only from the k most likely tokens; 0 is all. The update uses the untruncated policy."""
    top_p: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Sample only from the most likely tokens with this total probability; 1 is all. The update uses the untruncated
    policy."""
    stop: Strings = ()
    """Texts that end a response and are part of it. A text that is an added token of the tokenizer, such as <|eot_id|>,
    is matched as a token. The tokenizer's end-of-text token always ends a response."""
    gather_parameters: Literal["auto", "always", "never"] = "auto"
    """ZeRO-3: gather all parameters once per rollout instead of layer by layer; auto does so if they fit in memory."""
    forward_batch_size: PositiveInt | None = None
    """Number of responses sampled at once on each process; affects only memory and speed. The default is 64 on a CPU,
    and on a GPU a process's share of the responses of a step."""
    static_cache: Literal["auto", "always", "never"] = "auto"
    """Sample with a key-value cache of fixed size, so that a GPU can replay each token's step as a CUDA graph; affects
    only memory and speed. auto: on a GPU, for models that support it; always: also where no graph can be captured."""
    logprobs: Literal["auto", "sampled", "recomputed"] = "auto"
    """Source of the old log-probabilities, the entropy and the values: sampling itself, or another forward pass. auto
    is sampled if arithmetic is fp32, where both agree up to rounding."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig:
    model: str | None = None
    """Sequence classifier that scores texts: a hub id, a local folder, or `embedded:movie_reviews`, which is trained on
    first use."""
    label: str | None = None
    """Name (or number) of the label whose output is the score; must not be set for a model with one output."""
    output: Literal["logit", "probability"] = "logit"
    """Whether the score is the label's logit or its probability."""
    text: Literal["full", "response"] = "full"
    """Input of the classifier: prompt and response, or only the response."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """Format of the classifier's input. `plain`: prompt and response as they are; `chat`: a user turn and an assistant
    turn by the classifier's own chat template; auto is the format that its training recorded beside it, else plain."""
    chat_field: str | None = None
    """With the chat format: column of the data with the prompt for the classifier, a text or a list of {role, content};
    by default the policy's prompt, which must then be plain text, or a conversation by data.chat."""
    chat_template: str | None = None
    """With the chat format: a Jinja template, or the name of its file, in place of the classifier's own."""
    dtype: Dtype = "auto"
    """Dtype of the frozen classifier. On a GPU, auto is fp16, or bf16 for a model that was stored or trained in bf16;
    on a CPU, it is bf16 if the CPU has bf16 units, else fp32."""
    on_policy_base: bool = False
    """With lora.r above 0: score with the adapter and head of reward.model on the policy's own base, in the base's
    dtype, instead of loading a second model. reward.model must be trained over the same base with lora.merge=false."""
    batch_size: PositiveInt = 64
    """Number of texts that the classifier reads at once; affects only memory and speed."""
    url: str | None = None
    """Address of a reward server, which answers a POST of `{"prompts", "responses", "columns"}` in JSON with
    `{"scores": [...]}`. Its token is read from the environment variable RLHF_ACCEL_REWARD_TOKEN, never from a
    config."""
    function: Strings = ()
    """Import path(s) `package.module:callable` of `(prompts, responses, **columns) -> list[float]`."""
    import_from: str | None = None
    """Folder that reward.function and reward.gold are imported from, in addition to PYTHONPATH; by default the working
    folder, which is recorded in the run's config.yaml."""
    gold: Strings = ()
    """Import path(s) of functions like reward.function that are used in evaluations only and never in training, so that
    they show when the policy exploits weaknesses of the reward; not weighted, calibrated or clipped."""
    weights: Floats | None = None
    """Weights of the sum of reward.model, reward.url and reward.function, in this order, without those that are not
    set; by default all 1."""
    timeout: Positive | None = None
    """Seconds that a call of reward.url or reward.function may take; by default 60 for reward.url and no limit for
    reward.function."""
    retries: Annotated[Count, Field(ge=0, le=20)] = 2
    """Number of times that a failed call of reward.url or reward.function is repeated before the run stops."""
    retry_wait: Positive = 1.0
    """Seconds before the first retry; doubles with each further one."""
    calibrate: bool = False
    """Shift and scale scores to mean 0 and variance 1 over samples of the reference, which are drawn before step 1."""
    calibrate_samples: Annotated[Count, Field(ge=2)] = 128
    """Number of reference samples for the calibration."""
    clip: Positive | None = None
    """Clip scores (after calibration) to [-clip, clip]."""
    partial_every: NonNegativeInt = 0
    """Also score each response before its first token and after every so many tokens, so that the critic predicts only
    what the rest of the response adds. Advantages get less noisy, and the optimum does not change (potential-based
    shaping, Ng et al. 1999). For each response, the reward reads up to rollout.max_new_tokens / partial_every more
    texts, rounded up; 0 turns this off."""
    missing_eos_penalty: NonNegative = 0.0
    """Subtracted from the score of a response that is cut off at rollout.max_new_tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PPOConfig:
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo", "reinforce++"] = "gae"
    """Estimator of the advantage. `gae` uses a critic, the others none. `rloo`, `grpo` and `dr_grpo` compare the
    responses to one prompt (rollout.samples_per_prompt above 1); `reinforce++` needs one response."""
    ppo_epochs: PositiveInt = 4
    """Number of passes over each batch of rollouts."""
    num_minibatches: PositiveInt = 1
    """Number of optimizer steps per pass; must divide rollout.batch_size times rollout.samples_per_prompt."""
    micro_batch_tokens: PositiveInt = 8192
    """Maximum number of prompt and response tokens, including padding, in one forward and backward pass, and in a pass
    of the reference or a separate critic; affects only memory and speed."""
    gamma: Fraction = 1.0
    """Discount per token."""
    lam: Fraction = 0.95
    """Lambda of generalised advantage estimation."""
    policy_loss: Literal["clip", "cispo", "gspo"] = "clip"
    """Loss of the policy. `clip`: PPO's clipped ratio, token by token; `cispo`: the ratio, cut at its upper bound, only
    weighs the gradient (MiniMax-M1); `gspo`: the clipped ratio of whole responses (Zheng et al. 2025)."""
    loss_reduction: Literal["token", "sequence", "constant"] = "token"
    """Mean of the losses over a minibatch: over its tokens; over its responses, each with the mean of its tokens; or
    its sum divided by responses times rollout.max_new_tokens (Dr. GRPO)."""
    cliprange: Positive = 0.2
    """Clips the probability ratio to [1 - cliprange, 1 + cliprange]."""
    cliprange_high: Positive | None = None
    """Upper bound of the ratio, 1 + cliprange_high, if it differs from the lower one (DAPO's clip-higher)."""
    dual_clip: Annotated[Number, Field(gt=1)] | None = None
    """Bounds the loss of a token with a negative advantage to this many times its advantage (Ye et al. 2020)."""
    cliprange_value: Positive | None = 0.2
    """Largest difference between new and old values in the clipped value loss; null does not clip."""
    vf_coef: NonNegative = 0.1
    """Weight of the value loss."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegative = 0.05
    """Weight of the KL to the reference, per nat; with kl_target, the initial weight."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Whether this KL is a penalty in the reward, or a term of the loss."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Per-token estimator of this KL (Schulman, "Approximating KL divergence", 2020). Only k1 is allowed in the reward:
    there, k2 and k3 would push the policy away from the reference. In the loss, the gradient of k2 is that of the KL
    to the reference, that of k3 is that of the KL from the reference, and that of k1 is 0 on average."""
    kl_target: Positive | None = None
    """Adapt kl_coef to keep the KL near this many nats per response; null keeps kl_coef fixed."""
    kl_horizon: Positive = 10_000.0
    """Number of episodes over which the adaptive coefficient may change by a factor of about e^0.2."""
    whiten_rewards: bool = False
    """Divide per-token rewards by their standard deviation over the batch."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and variance 1 over the tokens of the batch; those of rloo, grpo and dr_grpo
    have the scale of their group and stay as they are."""
    target_kl_stop: Positive | None = None
    """Skip the remaining updates of a step once the policy has moved this many nats per token from the one that
    sampled; null never skips."""

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def compares_groups(self) -> bool:
        """Whether advantages compare the responses to one prompt."""
        return self.advantage in ("rloo", "grpo", "dr_grpo")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimConfig:
    lr: Positive = 1e-5
    """Peak learning rate of AdamW."""
    critic_lr: Positive | None = None
    """Learning rate of the critic's own parameters; by default optim.lr."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW, applied to matrices only."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates for the running averages of the gradient and its square."""
    eps: Positive = 1e-8
    """AdamW's epsilon, which is added to the denominator of the update."""
    max_grad_norm: Positive | None = 1.0
    """Clip the joint gradient norm of policy and critic to this value; null does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Schedule of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Number of PPO steps over which the learning rate rises from 0."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A PPO run. Keys that contradict each other are an error: a `ConfigError` from `load` and `parse`, and pydantic's
    `ValidationError`, which is a `ValueError` too, if the class is called."""

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
    """Sizes derived from the config: `rollout` responses per step, to `prompts` prompts, are split into minibatches of
    `minibatch` responses."""

    prompts: int
    rollout: int
    minibatch: int

    @classmethod
    def of(cls, config: Config) -> BatchSizes:
        prompts, minibatches = config.rollout.batch_size, config.ppo.num_minibatches
        responses = prompts * config.rollout.samples_per_prompt
        return cls(
            prompts=prompts,
            rollout=responses,
            minibatch=responses // minibatches,
        )


def sampled_at_once(rollout: RolloutConfig, processes: int, *, on_gpu: bool) -> int:
    """The most responses that one of the processes samples at once: rollout.forward_batch_size, or its default."""
    share = -(-rollout.batch_size * rollout.samples_per_prompt // processes)
    return rollout.forward_batch_size or (share if on_gpu else _AT_ONCE_ON_CPU)
