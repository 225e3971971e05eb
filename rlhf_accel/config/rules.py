"""Which keys contradict each other, and which of them may change when a run is resumed.

Each rule needs only the config, so a run that cannot work fails before any model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rlhf_accel.config.keys import flatten, key_names, short, unknown
from rlhf_accel.system.errors import ConfigError

if TYPE_CHECKING:  # the schema calls these rules when a config is made
    from rlhf_accel.config.reward_schema import RewardTrainingConfig
    from rlhf_accel.config.schema import Config, DataConfig, RewardConfig, RolloutConfig

# Keys of local paths: a run records them as absolute paths, older versions recorded them as they were given.
_PATHS = ("model.name_or_path", "lora.adapter", "data.source", "data.eval_split", "reward.model")

# Keys that may change when a run is resumed: results depend on them only by rounding. The exception is total_steps,
# which is part of the learning rate's schedule; users who raise it expect that.
MAY_CHANGE = frozenset(
    [
        *("run.output_dir", "run.name", "run.total_steps", "run.save_every", "run.keep_checkpoints", "run.checkpoint"),
        *("run.max_failed_saves", "run.max_skipped_steps", "run.eval_every", "run.sample_every", "run.sample_count"),
        *("run.resume", "run.changes", "run.collective_timeout", "run.trackers", "run.project", "run.best_kl_budget"),
        *("run.push_to_hub", "run.hub_private", "run.report", "reward.gold"),
        *("run.fast_kernels", "model.attention", "model.gradient_checkpointing", "ppo.micro_batch_tokens"),
        *("rollout.logprobs", "rollout.gather_parameters", "rollout.forward_batch_size", "rollout.static_cache"),
        *("reward.import_from", "reward.batch_size", "reward.timeout", "reward.retries", "reward.retry_wait"),
    ]
)


def reward_contradictions(config: RewardTrainingConfig) -> Iterator[ConfigError]:
    run, data, model = config.run, config.data, config.model
    if data.eval_split in (data.split, data.source):
        yield ConfigError(
            f"data.eval_split={data.eval_split} is the training data; name another split", key="data.eval_split"
        )
    if data.tuning_split is not None and data.tuning_split in (data.split, data.source, data.eval_split):
        yield ConfigError(
            f"data.tuning_split={data.tuning_split} is the training or the evaluation data; name another split, or "
            "remove it to use half of data.eval_split",
            key="data.tuning_split",
            others=("data.eval_split",),
        )
    if run.eval_every > 1 and run.eval_every != int(run.eval_every):
        yield ConfigError(
            f"run.eval_every={run.eval_every:g} is not a number of steps; use a whole number, or a fraction below 1",
            key="run.eval_every",
        )
    if data.objective != "pairs":
        given = [key for key in ("choice_field", "margin_field") if getattr(data, key) is not None]
        if given:
            yield ConfigError(
                f"data.{given[0]} is set, which only applies to pairs; remove it, or set data.objective=pairs",
                key=f"data.{given[0]}",
                others=("data.objective",),
            )
        if model.normalize not in ("auto", "none"):
            yield ConfigError(
                f"model.normalize={model.normalize} would change the scale of the scores of data.objective="
                f"{data.objective}; remove it",
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
            f"data.pair_fields={list(data.pair_fields)} names one column twice; name two columns",
            key="data.pair_fields",
        )
    if config.lora.r == 0 and not config.lora.merge:
        yield ConfigError(
            "lora.merge=false leaves adapters unmerged, but lora.r=0 trains all weights; set lora.r above 0",
            key="lora.merge",
            others=("lora.r",),
        )


def check_trainable(config: Config) -> None:
    """Raises `ConfigError` for settings that older versions allowed and that give wrong results.

    In the reward, an estimator c(y) has the gradient E[c grad log pi]. Only for k1 is this the gradient of its mean.
    For k3 it is grad KL(pi || ref) - grad KL(ref || pi), and for k2 that of squared log-ratios of either sign: near the
    reference both vanish to first order, so nothing pulls the policy back, and the rest pushes it away
    (arXiv 2512.21852).
    """
    ppo = config.ppo
    if ppo.kl_in == "reward" and ppo.kl_estimator != "k1" and ppo.kl_coef > 0:
        raise ConfigError(
            f"ppo.kl_estimator={ppo.kl_estimator} in the reward pushes the policy away from the reference (its "
            "gradient is not that of the KL; arXiv 2512.21852); set ppo.kl_estimator=k1 or ppo.kl_in=loss, and also "
            "run.changes=[ppo.kl_estimator] to resume a run of an older version that has it",
            key="ppo.kl_estimator",
            found=ppo.kl_estimator,
            expected="k1",
        )


def changed_keys(before: Config, now: Config) -> list[str]:
    """Keys whose values differ and may not, each as `key (was X, is Y)`."""
    allowed = MAY_CHANGE | set(now.run.changes)
    was, is_now = flatten(asdict(before)), flatten(asdict(now))
    return [
        f"{key} (was {short(was[key])}, is {short(is_now[key])})"
        for key in key_names(type(now))
        if key not in allowed and was[key] != is_now[key] and not (key in _PATHS and _leads_to(was[key], is_now[key]))
    ]


def _leads_to(relative: str | None, path: str | None) -> bool:
    """Whether a relative path may be this absolute one, seen from some working folder.

    >>> _leads_to("./models/a", "/home/me/models/a"), _leads_to("a", "/home/me/models/b"), _leads_to("/a", "/b/a")
    (True, False, False)
    """
    if relative is None or path is None or Path(relative).is_absolute() or not Path(path).is_absolute():
        return False
    parts = [part for part in Path(relative).parts if part != ".."]
    return bool(parts) and list(Path(path).parts[-len(parts) :]) == parts


def contradictions(config: Config) -> Iterator[ConfigError]:
    run, data, rollout, ppo = config.run, config.data, config.rollout, config.ppo
    if rollout.batch_size * rollout.samples_per_prompt % ppo.num_minibatches:
        yield ConfigError(
            f"ppo.num_minibatches={ppo.num_minibatches} does not divide {_responses(rollout)}; choose a divisor",
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
            f"run.project={short(run.project)} is not a valid name for trackers; avoid / \\ # ? % :",
            key="run.project",
        )
    if not all(rollout.stop):
        yield ConfigError(
            "rollout.stop contains an empty text, which is part of every response; remove it", key="rollout.stop"
        )
    if data.eval_split is not None and data.eval_split in (data.split, data.source):
        yield ConfigError(
            f"data.eval_split={data.eval_split} is the training data; name another split, or remove it to hold out "
            "a tenth of data.split",
            key="data.eval_split",
            others=("data.split",),
        )
    yield from _chat_contradictions(data)
    if data.prompt_tokens is not None:
        low, high = data.prompt_tokens
        if low > high:
            yield ConfigError(
                f"data.prompt_tokens=[{low}, {high}] is not a range; put the smaller number first",
                key="data.prompt_tokens",
            )
        if high > rollout.max_prompt_tokens:
            yield ConfigError(
                f"data.prompt_tokens=[{low}, {high}] exceeds rollout.max_prompt_tokens="
                f"{rollout.max_prompt_tokens}; raise rollout.max_prompt_tokens",
                key="data.prompt_tokens",
                others=("rollout.max_prompt_tokens",),
            )
    yield from _advantage_contradictions(config)
    yield from _scoring_contradictions(config)
    yield from _model_contradictions(config)
    yield from _lora_contradictions(config)
    yield from _ppo_contradictions(config)


def _chat_contradictions(data: DataConfig) -> Iterator[ConfigError]:
    for key in ("system", "chat_template", "thinking"):
        if getattr(data, key) is not None and not data.chat:
            yield ConfigError(
                f"data.{key} is set, but data.chat=false uses no chat template; set data.chat=true, or remove "
                f"data.{key}",
                key=f"data.{key}",
                others=("data.chat",),
            )
    if data.chat and data.prompt_tokens is not None:
        yield ConfigError(
            f"data.prompt_tokens={list(data.prompt_tokens)} cuts prompts, and data.chat=true makes conversations, "
            "which cannot be cut; remove one of them",
            key="data.prompt_tokens",
            others=("data.chat",),
        )


def without_effect(config: Config) -> list[str]:
    """Keys of a critic that differ from their defaults where none is built."""
    if config.ppo.has_critic:
        return []
    keys = ("ppo.lam", "ppo.vf_coef", "ppo.cliprange_value", "optim.critic_lr", "model.critic_init")
    given, default = flatten(asdict(config)), flatten(asdict(type(config)()))
    return [key for key in keys if given[key] != default[key]]


def _responses(rollout: RolloutConfig) -> str:
    """The keys that make the number of responses of a step, with their values."""
    each = f" x rollout.samples_per_prompt={rollout.samples_per_prompt}" if rollout.samples_per_prompt > 1 else ""
    return f"rollout.batch_size={rollout.batch_size}{each}"


def _advantage_contradictions(config: Config) -> Iterator[ConfigError]:
    ppo, samples = config.ppo, config.rollout.samples_per_prompt
    named = f"ppo.advantage={ppo.advantage}"
    if ppo.compares_groups and samples < 2:
        yield ConfigError(
            f"{named} compares the responses to one prompt, but rollout.samples_per_prompt={samples}; set it to 2 or "
            "more",
            key="rollout.samples_per_prompt",
            others=("ppo.advantage",),
        )
    if ppo.compares_groups and ppo.gamma != 1:
        yield ConfigError(
            f"{named} gives all tokens of a response the same advantage, so ppo.gamma={ppo.gamma:g} discounts nothing; "
            "set ppo.gamma=1",
            key="ppo.gamma",
            others=("ppo.advantage",),
        )
    if ppo.kl_in == "loss" and ppo.kl_estimator == "k1" and ppo.kl_coef > 0:
        yield ConfigError(
            "ppo.kl_in=loss with ppo.kl_estimator=k1 has no effect: the gradient of k1 is 0 on average; set "
            "ppo.kl_estimator to k2 or k3",
            key="ppo.kl_estimator",
            others=("ppo.kl_in",),
        )
    if ppo.policy_loss == "cispo" and ppo.dual_clip is not None:
        yield ConfigError(
            "ppo.dual_clip bounds a clipped ratio, and ppo.policy_loss=cispo clips none; remove ppo.dual_clip",
            key="ppo.dual_clip",
            others=("ppo.policy_loss",),
        )
    if ppo.has_critic:
        return
    if config.model.critic != "head":
        yield ConfigError(
            f"{named} has no critic, but model.critic={config.model.critic}; remove model.critic, or set "
            "ppo.advantage=gae",
            key="model.critic",
            others=("ppo.advantage",),
        )
    if config.reward.partial_every:
        yield ConfigError(
            f"reward.partial_every={config.reward.partial_every} is a part of the critic's values, and {named} has no "
            "critic; set reward.partial_every=0, or ppo.advantage=gae",
            key="reward.partial_every",
            others=("ppo.advantage",),
        )


def _ppo_contradictions(config: Config) -> Iterator[ConfigError]:
    run, rollout, ppo = config.run, config.rollout, config.ppo
    if rollout.max_prompt_tokens + rollout.max_new_tokens > ppo.micro_batch_tokens:
        yield ConfigError(
            f"ppo.micro_batch_tokens={ppo.micro_batch_tokens} is below one sample's rollout.max_prompt_tokens + "
            f"rollout.max_new_tokens={rollout.max_prompt_tokens + rollout.max_new_tokens}; raise it",
            key="ppo.micro_batch_tokens",
            others=("rollout.max_prompt_tokens", "rollout.max_new_tokens"),
        )
    if ppo.kl_target is not None and ppo.kl_coef == 0:
        yield ConfigError(
            "ppo.kl_target is set, but ppo.kl_coef=0 can never rise; set ppo.kl_coef above 0",
            key="ppo.kl_target",
            others=("ppo.kl_coef",),
        )
    # In one step the controller changes its coefficient by at most a fraction of 0.2 x batch / horizon, which must stay
    # below 1.
    responses = rollout.batch_size * rollout.samples_per_prompt
    if ppo.kl_target is not None and ppo.kl_horizon <= 0.2 * responses:
        yield ConfigError(
            f"ppo.kl_horizon={ppo.kl_horizon:g} could set the coefficient to 0 in one step of {_responses(rollout)}; "
            f"raise it above {0.2 * responses:g}",
            key="ppo.kl_horizon",
            others=("rollout.batch_size",),
        )
    if run.resume in ("latest", "auto") and run.output_dir is None:
        yield ConfigError(
            f"run.resume={run.resume} needs run.output_dir, the folder of the run to resume",
            key="run.resume",
            others=("run.output_dir",),
        )
    known = key_names(type(config))
    for key in run.changes:
        if key not in known:
            yield ConfigError(f"run.changes: {unknown(key, known)}", key="run.changes")


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
            f"reward.timeout={reward.timeout:g} with reward.retries={reward.retries} may take {patience:g} s, but "
            f"the other processes wait for run.collective_timeout={config.run.collective_timeout:g} s; raise "
            "run.collective_timeout",
            key="reward.timeout",
            others=("reward.retries", "run.collective_timeout"),
        )
    if reward.partial_every and config.ppo.whiten_rewards:
        yield ConfigError(
            f"reward.partial_every={reward.partial_every} needs rewards in the unit of the scores, but "
            "ppo.whiten_rewards=true scales them; remove ppo.whiten_rewards (reward.calibrate=true scales scores), or "
            "set reward.partial_every to 0",
            key="reward.partial_every",
            others=("ppo.whiten_rewards",),
        )
    for key, default in (("label", None), ("format", "auto"), ("chat_field", None), ("chat_template", None)):
        value = getattr(reward, key)
        if reward.model is None and value != default:
            yield ConfigError(
                f"reward.{key}={short(value)} is set without reward.model; name the model or remove reward.{key}",
                key=f"reward.{key}",
                others=("reward.model",),
            )
    if reward.on_policy_base:
        yield from _shared_base_problems(config)
    for key in ("chat_field", "chat_template"):
        if reward.format == "plain" and getattr(reward, key) is not None:
            yield ConfigError(
                f"reward.{key} is set, but reward.format=plain does not use turns; remove one of them",
                key=f"reward.{key}",
                others=("reward.format",),
            )


def _shared_base_problems(config: Config) -> Iterator[ConfigError]:
    named, key = "reward.on_policy_base=true", "reward.on_policy_base"
    if config.reward.model is None:
        yield ConfigError(
            f"{named} is set without reward.model; name an adapter that train-reward wrote, or remove it",
            key=key,
            others=("reward.model",),
        )
    if config.lora.r == 0:
        yield ConfigError(
            f"{named}, but lora.r=0 trains the base that the reward model would be scored on; set lora.r above 0",
            key=key,
            others=("lora.r",),
        )
    if config.model.load_in_4bit:
        yield ConfigError(
            f"{named}, but model.load_in_4bit=true rounds the base that the reward model was trained over; remove one "
            "of them",
            key=key,
            others=("model.load_in_4bit",),
        )
    if config.reward.dtype != "auto":
        yield ConfigError(
            f"reward.dtype={config.reward.dtype} has no effect with {named}, which scores in the dtype of the base; "
            "remove it, or set model.dtype",
            key="reward.dtype",
            others=(key, "model.dtype"),
        )


def _gold_problems(reward: RewardConfig) -> Iterator[ConfigError]:
    names = [gold_name(target) for target in reward.gold]
    for name in names:
        if names.count(name) > 1:
            yield ConfigError(
                f"reward.gold names {name} twice; metrics are named after the callable, so rename one or remove it",
                key="reward.gold",
            )
    for target in reward.gold:
        if target in reward.function:
            yield ConfigError(
                f"reward.gold={target} is also in reward.function, but training must not use it; remove one of them",
                key="reward.gold",
                others=("reward.function",),
            )


def _url_problems(url: str) -> Iterator[ConfigError]:
    """The messages repeat only the name of the server, since the rest of the address may be a secret."""
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
            f"reward.url to {parts.hostname} contains more than scheme, host, port and path, which config.yaml "
            "would record; put a secret into the environment variable RLHF_ACCEL_REWARD_TOKEN",
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
            f"lora.modules_to_save are fully trainable, and model.dtype={model.dtype} would lose small updates to "
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
            "model.load_in_4bit=true supports only one base; set model.critic to adapter or head",
            key="model.load_in_4bit",
            others=("model.critic",),
        )
    bases = ("fp32",) if lora.r else ("fp32", "auto")  # auto is a bf16 base with LoRA
    if model.attention.startswith("flash") and config.run.precision == "fp32" and model.dtype in bases:
        yield ConfigError(
            f"model.attention={model.attention} computes in half precision only, and run.precision=fp32; set "
            "run.precision to auto or bf16, or model.attention=sdpa",
            key="model.attention",
            others=("run.precision", "model.dtype"),
        )


def _lora_contradictions(config: Config) -> Iterator[ConfigError]:
    model, lora = config.model, config.lora
    unused = [key for key in ("modules_to_save", "use_rslora", "use_dora") if getattr(lora, key)]
    if lora.r == 0 and unused:
        yield ConfigError(
            f"lora.{unused[0]} is set, but lora.r=0 is full fine-tuning; set lora.r above 0",
            key=f"lora.{unused[0]}",
            others=("lora.r",),
        )
    if lora.adapter is not None and lora.r == 0:
        yield ConfigError(
            "lora.adapter is set, but lora.r=0 is full fine-tuning; set lora.r to the adapter's rank",
            key="lora.adapter",
            others=("lora.r",),
        )
    if lora.adapter is not None and lora.modules_to_save:
        yield ConfigError(
            "lora.modules_to_save is set together with lora.adapter, which has its own; remove lora.modules_to_save",
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


def gold_name(target: str) -> str:
    """The name of a gold reward in metrics: that of the callable.

    >>> gold_name("rlhf_accel.reward:vader")
    'vader'
    """
    return target.rpartition(":")[2]
