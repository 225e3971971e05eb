"""The parts of a run, built from its config: the same for training and for commands that only look at a run.

Knows the order in which a run is checked: quick checks come first, and a reward model that may have to be trained on
first use comes last. Writes nothing and knows no folder of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.config.schema import BatchSizes, Config
from rlhf_accel.data import wheels
from rlhf_accel.data.conversations import MESSAGES
from rlhf_accel.data.prompts import Prompts, split_rows
from rlhf_accel.data.reward_texts import special_token
from rlhf_accel.data.tokenizer import Tokens
from rlhf_accel.distributed.runtime import Runtime
from rlhf_accel.models import lora, probes
from rlhf_accel.models.loading import DTYPES, LanguageModel
from rlhf_accel.models.policy import left_out, load_policy, resolve_dtype
from rlhf_accel.models.policy_with_value import PolicyWithValue, build
from rlhf_accel.models.positions import check_window
from rlhf_accel.models.reference import load_reference
from rlhf_accel.models.trainable import freeze_unreached, parameter_groups
from rlhf_accel.models.unmerged import put_on_base, require_unmerged
from rlhf_accel.reward import Reward, RewardError, RewardFunction, SharedBase, load_golds, load_reward, reward_of
from rlhf_accel.reward import cautions as cautions_of
from rlhf_accel.rollout import padding
from rlhf_accel.rollout.collector import Collector
from rlhf_accel.rollout.decoding import StaticForm
from rlhf_accel.rollout.engine import BuiltinEngine, asks_for_static
from rlhf_accel.rollout.scoring import WITHOUT_PARTS
from rlhf_accel.system.arithmetic import product_arithmetic, product_error
from rlhf_accel.system.errors import ConfigError

_PROBED = 32  # prompts whose tokens are compared with the tokenizer's own
_READ = 64  # prompts that are searched for special tokens

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The parts of a run. Nothing here changes during the run, except for the weights in `runtime.module`."""

    config: Config
    sizes: BatchSizes
    runtime: Runtime
    tokens: Tokens
    prompts: Prompts
    held_out: Prompts | None
    reward: Reward  # on its own scale, before calibration
    golds: Mapping[str, Reward]
    collector: Collector
    dtype: torch.dtype  # of the coarsest arithmetic on the policy's way to a log-probability
    left_out: str | None  # parts of the checkpoint that are not trained
    description: str

    @classmethod
    def of(
        cls,
        config: Config,
        runtime: Runtime,
        reward: RewardFunction | None = None,
        *,
        critic: bool = True,
        resume: Path | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> Setup:
        """Load, check and prepare everything, with the weights of the checkpoint `resume` if it is given.

        Without `critic` no critic is built: the policy is only sampled. Raises `ConfigError` on every rank for anything
        that cannot work.
        """
        if not critic:  # nothing is trained, so nothing has to be computed again
            model = replace(config.model, critic="head", gradient_checkpointing=False)
            config = replace(config, model=model, reward=replace(config.reward, partial_every=0))
        if config.reward.on_policy_base:
            require_unmerged(_reward_path(config, runtime) or "", f"reward.model={config.reward.model}")
        train_rows, held_rows = _on_main_first(runtime, lambda: split_rows(config.data))
        path = _on_main_first(runtime, lambda: wheels.resolve_model(config.model.name_or_path))
        tokens = Tokens.load(path, trust_remote_code=config.model.trust_remote_code, data=config.data)
        tokens.stop_condition(config.rollout.stop)  # to raise its errors early
        limit, seed = config.rollout.max_prompt_tokens, config.run.seed
        prompts = Prompts.of(train_rows, tokens, config.data, limit, seed)
        held_out = Prompts.of(held_rows, tokens, config.data, limit, seed) if len(held_rows) else None
        check_prompt_tokens(prompts)
        if held_out is None and config.run.eval_samples:
            log("no evaluation: no text of data.source falls into the tenth held out; set data.eval_split")

        policy = load_policy(config, path, runtime.device)
        omitted = left_out(policy, config.model, path)
        check_window(config, policy, len(tokens.prefix))
        reference = load_reference(config, policy)
        reward_path = _reward_path(config, runtime)
        shared = _share_base(config, runtime, policy, reward_path)
        rewards = None if shared else _rewards(config, runtime, reward, reward_path, prompts)
        module, frozen = _build(config, runtime, policy, path, reward_path, critic=critic and config.ppo.has_critic)
        _prepare(config, runtime, module, resume)
        # On the policy's base, texts are scored by the prepared module.
        scorer, golds = rewards or _rewards(config, runtime, reward, reward_path, prompts, shared)
        dtype = _rounds_to(config, runtime)
        static = StaticForm(graphs=runtime.device.type == "cuda", log=log)
        _check_padding(config, runtime, prompts, tokens, dtype, static)
        return cls(
            config=config,
            sizes=BatchSizes.of(config),
            runtime=runtime,
            tokens=tokens,
            prompts=prompts,
            held_out=held_out,
            reward=scorer,
            golds=golds,
            collector=_collector(config, runtime, tokens, reference, dtype, static),
            dtype=dtype,
            left_out=omitted,
            description=_describe(config, runtime, module, frozen, len(prompts), scorer),
        )

    def cautions(self) -> list[tuple[str, str]]:
        """Warnings about the texts that the reward reads: (name of the check, message) for each."""
        rollout = self.config.rollout
        return cautions_of(self.reward, rollout.max_prompt_tokens, rollout.max_new_tokens)

    def arithmetic(self) -> dict[str, str]:
        """The device, and what `auto` means on it, so that a dump can be replayed in the same way."""
        names = {dtype: name for name, dtype in DTYPES.items()}
        found = {
            "device": self.runtime.device.type,
            "precision": self.runtime.precision,
            "model_dtype": names[resolve_dtype(self.config, self.runtime.device)],
        }
        for _, _, term in self.reward.classifiers:
            found["reward_dtype"] = names[term.dtype]
        return found


def start(config: Config, *, training: bool = True) -> Runtime:
    """The runtime of this launch. Raises `ConfigError` if the config cannot run under it."""
    run = config.run if training else replace(config.run, trackers=())
    runtime = Runtime(
        run,
        max_grad_norm=config.optim.max_grad_norm,
        minibatch=BatchSizes.of(config).minibatch,
        gather_parameters=config.rollout.gather_parameters,
    )
    if runtime.zero_stage == 3 and (config.lora.use_dora or config.model.load_in_4bit):
        key = "lora.use_dora" if config.lora.use_dora else "model.load_in_4bit"
        raise ConfigError(
            f"{key}=true does not work with ZeRO-3, which shards the base's weights; launch with ZeRO-2 or ddp", key=key
        )
    return runtime


def check_prompt_tokens(prompts: Prompts) -> str:
    """The result of the probe of prompt tokens, on a few prompts and on one that begins with BOS, as chat templates
    write it. Raises `ConfigError` if the policy would read other tokens than its tokenizer makes."""
    tokenizer = prompts.tokens.tokenizer
    if prompts.config.chat:
        few = prompts.fixed(_PROBED)
        read = [ids[mask].tolist() for ids, mask in zip(few.queries, few.query_mask, strict=True)]
        found = probes.chat_tokens(tokenizer, few.columns[MESSAGES], read, prompts.tokens.template_options)
    else:
        texts = prompts.some_texts(_PROBED)
        texts += [tokenizer.bos_token + text for text in texts[:1] if tokenizer.bos_token]
        found = probes.prompt_tokens(tokenizer, texts, prompts.tokens.encode(texts))
    if not found.passed:
        raise ConfigError(found.message, key="model.name_or_path", differing=found.difference)
    return found.message.removeprefix(f"{found.probe}: ")


def _on_main_first(runtime: Runtime, make: Callable[[], T]) -> T:
    """The main process of each node downloads or converts first; the others find the result."""
    with runtime.main_first():
        return make()


def _reward_path(config: Config, runtime: Runtime) -> str | None:
    name = config.reward.model
    return None if name is None else _on_main_first(runtime, lambda: wheels.resolve_model(name, "reward.model"))


def _share_base(config: Config, runtime: Runtime, policy: LanguageModel, path: str | None) -> SharedBase | None:
    """With reward.on_policy_base, the reward model's adapter is added to the policy; else None."""
    if not config.reward.on_policy_base or path is None:
        return None
    setting, trusted, device = f"reward.model={config.reward.model}", config.model.trust_remote_code, runtime.device
    classifier = _on_main_first(runtime, lambda: put_on_base(policy, path, setting, device, trust_remote_code=trusted))

    def passes(own: int) -> int:
        return own if runtime.has_whole_weights else int(runtime.max(torch.tensor(own)))

    return SharedBase(classifier=classifier, policy=lambda: runtime.plain_module.policy, passes=passes)


def _rewards(
    config: Config,
    runtime: Runtime,
    reward: RewardFunction | None,
    path: str | None,
    prompts: Prompts,
    shared: SharedBase | None = None,
) -> tuple[Reward, Mapping[str, Reward]]:
    """The reward and the gold rewards, tried on a few prompts."""
    scorer = _load_reward(config, runtime, reward, path, shared)
    _check_turns(config, scorer, prompts)
    golds = _on_main_first(runtime, lambda: load_golds(config.reward))
    _try_rewards(config, scorer, golds, prompts)
    return scorer, golds


def _load_reward(
    config: Config, runtime: Runtime, reward: RewardFunction | None, path: str | None, shared: SharedBase | None
) -> Reward:
    if reward is None:
        sizes = (config.rollout.max_prompt_tokens, config.rollout.max_new_tokens)
        trusted, device = config.model.trust_remote_code, runtime.device

        def load() -> Reward:
            return load_reward(
                config.reward,
                path,
                device,
                trust_remote_code=trusted,
                sample_tokens=sizes,
                shared=shared,
                conversations=config.data.chat,
            )

        # A shared base is checked by passes that all ranks may have to make together.
        return _on_main_first(runtime, load) if shared is None else load()
    if config.reward.model or config.reward.url or config.reward.function:
        raise ConfigError(
            "PPOTrainer(reward=…) is given beside reward.model, reward.url or reward.function; keep one of them",
            key="reward.function",
        )
    name = f"reward={getattr(reward, '__name__', type(reward).__name__)}"
    return reward_of(config.reward, ((name, 1.0, reward),))


def _check_turns(config: Config, reward: Reward, prompts: Prompts) -> None:
    """Raises `ConfigError` if a classifier would read prompts that a chat template formatted as a user's turn."""
    for name, _, term in reward.classifiers:
        if not term.reads_prompts_as_turns:
            continue
        few = prompts.fixed(_READ)
        rows = [ids[mask].tolist() for ids, mask in zip(few.queries, few.query_mask, strict=True)]
        marker = special_token(prompts.tokens.tokenizer, rows)
        if marker is not None:
            raise ConfigError(
                f"{name} reads conversations, and prompts of data.source={config.data.source} hold special tokens such "
                f"as {marker}, which do not reach it; name the column with the plain prompt, or the conversation, in "
                "reward.chat_field",
                key="reward.chat_field",
                marker=marker,
            )


def _try_rewards(config: Config, reward: Reward, golds: Mapping[str, Reward], prompts: Prompts) -> None:
    """Score a few prompts as they are, and with empty responses if parts of these will be scored, so that a reward
    that cannot work fails before training."""
    few, every = prompts.fixed(2), config.reward.partial_every
    try:
        for each in (reward, *golds.values()):
            each.try_out(few.texts, few.texts, few.columns)
    except RewardError as error:
        raise ConfigError(str(error), key=error.key, **error.facts) from error
    if not every:
        return
    try:
        replace(reward, retries=0)(few.texts, [""] * len(few), few.columns)
    except RewardError as error:
        raise ConfigError(
            f"{error}; with reward.partial_every={every} it is also asked about prompts with an empty response: let it "
            f"score these, or {WITHOUT_PARTS}",
            key="reward.partial_every",
            **error.facts,
        ) from error


def _build(
    config: Config,
    runtime: Runtime,
    policy: LanguageModel,
    path: str,
    reward_path: str | None,
    *,
    critic: bool,
) -> tuple[PolicyWithValue, list[str]]:
    """The module, and the names of its tensors that stay frozen since no text reaches them."""
    on_experts = lora.on_tensors(policy) if runtime.zero_stage == 3 else None
    if on_experts is not None:
        raise ConfigError(
            f"lora.target_modules={list(config.lora.target_modules or ())}: puts an adapter on the experts' tensors "
            f"({on_experts}), which ZeRO-3 shards; name layers of attention, leave the key out, or launch with ZeRO-2 "
            "or ddp",
            key="lora.target_modules",
        )
    try:
        module = build(config, policy, path, reward_path, critic=critic)
        return module, freeze_unreached(module)
    except ConfigError:
        raise
    except Exception as error:  # models are many, and this is the first pass
        message = f"model.name_or_path={config.model.name_or_path}: {padding.cannot_run(error)}"
        raise ConfigError(message, key="model.name_or_path") from error


def _prepare(config: Config, runtime: Runtime, module: PolicyWithValue, resume: Path | None) -> None:
    optim = config.optim
    groups = parameter_groups(module, optim)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    runtime.prepare(module, optimizer, resume)


def _rounds_to(config: Config, runtime: Runtime) -> torch.dtype:
    """The coarsest arithmetic in the computation of the policy's log-probabilities; fp16 stands for TF32 too, which has
    as many bits. The same on all ranks, whatever hardware each has, since they have to run the same passes."""
    own = resolve_dtype(config, runtime.device)
    products = product_arithmetic(product_error(runtime.device))
    if "bf16" in (runtime.precision, products) or own == torch.bfloat16 or config.model.load_in_4bit:
        here = torch.bfloat16
    else:
        here = torch.float16 if products == "TF32" or own == torch.float16 else torch.float32
    found = [dtype for dtype in (torch.bfloat16, torch.float16) if runtime.anywhere(here == dtype)]
    return (*found, torch.float32)[0]


def _check_padding(
    config: Config, runtime: Runtime, prompts: Prompts, tokens: Tokens, dtype: torch.dtype, static: StaticForm
) -> None:
    """Raises `ConfigError` on every rank if policy or critic give other results in a padded batch than alone, or cannot
    be run at all. With ZeRO-3 each pass is a collective. Classifiers are checked where they are loaded."""
    few = prompts.fixed(3)
    batch = padding.made_up(few.queries[few.query_mask], tokens.pad_id).to(runtime.device)
    module = runtime.plain_module
    checks = [
        lambda: padding.policy_alone(module.policy, batch, dtype),
        lambda: padding.sampled_is_recomputed(module.policy, batch, tokens.pad_id, dtype),
    ]
    if module.has_critic and not module.critic_reads_policy:
        checks.append(lambda: padding.critic_alone(module, batch, dtype))
    for check in checks:
        with runtime.autocast():
            problem = runtime.first_failure(padding.problem(check))
        if problem is not None:
            named = f"model.name_or_path={config.model.name_or_path}"
            # Some layers read the weight of another layer, which ZeRO-3 gathers only for that layer.
            cut = ", or launch with ZeRO-2 or ddp if it runs there" if runtime.zero_stage == 3 else ""
            raise ConfigError(f"{named}: {problem}{cut}", key="model.name_or_path")
    if asks_for_static(config.rollout, static):
        _check_static(config, runtime, batch, tokens, dtype, static)


def _check_static(
    config: Config, runtime: Runtime, batch: Sequences, tokens: Tokens, dtype: torch.dtype, static: StaticForm
) -> None:
    """Refuse the static form on every rank, and go on without it, if it does not compute what a pass does."""
    # Hooks that gather the weights that ZeRO-3 has cut cannot be captured; while they are gathered there are none.
    tried = static if runtime.has_whole_weights else replace(static, graphs=False, log=lambda _: None)
    longest, policy = config.rollout.max_prompt_tokens + config.rollout.max_new_tokens, runtime.plain_module.policy
    with runtime.autocast():
        reason = padding.static_problem(policy, batch, tokens.pad_id, dtype, tried, longest)
    reason = runtime.first_failure(reason)
    if reason is not None:
        static.refuse(reason)


def _collector(
    config: Config,
    runtime: Runtime,
    tokens: Tokens,
    reference: nn.Module | None,
    dtype: torch.dtype,
    static: StaticForm,
) -> Collector:
    kept = config.rollout.logprobs
    of_sampling = kept == "sampled" or (kept == "auto" and dtype == torch.float32)
    module = runtime.plain_module
    with_values = of_sampling and module.has_critic and module.critic_reads_policy
    return Collector(
        config=config.rollout,
        runtime=runtime,
        tokens=tokens,
        engine=BuiltinEngine(
            runtime=runtime,
            tokens=tokens,
            with_values=with_values,
            static=static,
            fast_kernels=config.run.fast_kernels,
        ),
        reference=None if reference is None else runtime.prepare_frozen(reference),
        pass_tokens=config.ppo.micro_batch_tokens,
        recompute=not of_sampling,
    )


def _describe(
    config: Config, runtime: Runtime, module: PolicyWithValue, frozen: list[str], prompts: int, reward: Reward
) -> str:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in module.parameters()]  # also if ZeRO-3 cut it
    trainable, held = sum(size for size, is_trainable in sizes if is_trainable), sum(size for size, _ in sizes)
    dtype = str(resolve_dtype(config, runtime.device)).removeprefix("torch.")
    lines = [
        f"policy {config.model.name_or_path} in {dtype}, {trainable:,} of {held:,} parameters are trained; critic "
        f"{config.model.critic if module.has_critic else 'none'}; {runtime.launch} on {runtime.device.type} in "
        f"{runtime.precision}; {prompts} prompts to train on; scored by "
        + " + ".join(name for name, _, _ in reward.terms)
    ]
    if frozen:
        parts = sorted({".".join(name.split(".")[1:4]) for name in frozen})
        lines.append(f"{len(frozen)} tensors stay frozen, since no text reaches them ({', '.join(parts[:3])})")
    adapters, family = config.lora, str(module.policy.config.model_type)
    named = adapters.target_modules is not None or adapters.adapter is not None
    if adapters.r and not named and not lora.knows(family):
        lines.append(f"adapters on all linear layers but experts and routers: peft has no default for {family}")
    return "\n".join(lines)
