"""Policy and critic as one module, LoRA, and the reference. Knows transformers and peft, no tokenizer and no rank."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from rlhf_accel.algorithm import ppo
from rlhf_accel.algorithm.batches import Sequences, TokenOutputs
from rlhf_accel.config.schema import Config, ModelConfig, OptimConfig
from rlhf_accel.data.loading import adapted, adapter_config, pretrained
from rlhf_accel.models import adapters
from rlhf_accel.models import cpu_kernels as kernels
from rlhf_accel.models.calls import accepted, first_position, position_ids, vocabulary_inputs
from rlhf_accel.system.errors import ConfigError, key_in
from rlhf_accel.system.process import computes_in_bf16

# A model of transformers, or one that peft wrapped: an nn.Module with more methods than types can tell.
LanguageModel = Any

# Names of adapters: the policy's is the one that peft loads and saves by default.
POLICY, CRITIC, REFERENCE = "default", "critic", "reference"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ValueHead(nn.Module):
    """A scalar for each hidden state, in fp32 whatever the trunk computes in: it is small and its targets are fine.

    Starts at zero (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"): values say nothing until they
    have learnt something, and every world size starts from the same ones.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Float[Tensor, "B R H"]) -> Float[Tensor, "B R"]:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)[..., 0]


class PolicyWithValue(nn.Module):
    """A causal language model with a critic, prepared and optimised as one.

    The value head reads `critic`, a transformer without a head; where that is None, the policy's own trunk: with the
    policy's adapter, or with an adapter of its own if the policy has one by the name `CRITIC`.
    """

    def __init__(
        self, policy: LanguageModel, critic: LanguageModel | None, temperature: float, width: int | None = None
    ) -> None:
        """`width` is that of the states that the head reads, where it is known already."""
        super().__init__()
        self.policy: LanguageModel = policy
        self.critic: LanguageModel | None = critic
        self.temperature = temperature
        self.value_head = ValueHead(self.states_width() if width is None else width)

    def forward(
        self,
        queries: Tensor,
        query_mask: Tensor,
        responses: Tensor,
        response_mask: Tensor,
        *,
        with_entropy: bool = False,
    ) -> TokenOutputs:
        """Log-probability, value and, if asked for, entropy at every response token; shapes as in `Sequences`.

        The value of a token is read where the policy chose it, from the state before it.
        """
        inputs = (queries, query_mask, responses, response_mask)
        logits, hidden = response_logits(self.policy, *inputs)
        logprobs = ppo.token_logprobs(logits, responses, self.temperature)
        entropy = ppo.token_entropy(logits, self.temperature) if with_entropy else None
        values = self.value_head(hidden) if self.critic_reads_policy else self.values(*inputs)
        return TokenOutputs(logprobs=logprobs, values=values, entropy=entropy)

    def states_width(self) -> int:
        """Of the states that the head reads, by a pass where it is not the vocabulary layer's: some trunks project them
        (OPT-350m), some vocabulary layers read others (RemBERT), and configs of parts have several sizes."""
        if self.critic_reads_policy:
            return int(self.policy.get_output_embeddings().in_features)
        with self.critic_trunk() as trunk, torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.int64, device=next(trunk.parameters()).device)
            states = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            return int(states.shape[-1])

    @property
    def critic_reads_policy(self) -> bool:
        """Whether the value head reads the very states that the policy's vocabulary layer reads."""
        return self.critic is None and CRITIC not in getattr(self.policy, "peft_config", ())

    def values(
        self, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
    ) -> Float[Tensor, "B R"]:
        """The values alone, of a critic that has a pass of its own."""
        with self.critic_trunk() as trunk:
            states = response_hidden(trunk, queries, query_mask, responses, response_mask)
            values: Tensor = self.value_head(states)
            return values

    @contextlib.contextmanager
    def critic_trunk(self) -> Iterator[LanguageModel]:
        """The transformer that such a critic reads; with the critic's adapter while the context lasts."""
        if self.critic is not None:
            yield self.critic
            return
        with adapter(self.policy, CRITIC):
            whole = self.policy.get_base_model()
            # Llama 4 names its trunk by another prefix than the one under which it has it.
            yield whole.base_model if whole.base_model is not whole else whole.model


class Reference(nn.Module):
    """A frozen copy of the policy, for full fine-tuning."""

    def __init__(self, policy: LanguageModel, temperature: float) -> None:
        super().__init__()
        self.policy = policy.requires_grad_(False).eval()
        self.temperature = temperature

    def forward(
        self, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
    ) -> Float[Tensor, "B R"]:
        """Log-probability of every response token, in nats."""
        logits, _ = response_logits(self.policy, queries, query_mask, responses, response_mask)
        return ppo.token_logprobs(logits, responses, self.temperature)


@contextlib.contextmanager
def reference_policy(
    module: PolicyWithValue, reference: nn.Module | None
) -> Iterator[Callable[[Sequences], Float[Tensor, "B R"]]]:
    """The reference as a function of sequences: the frozen copy if there is one, else the policy without its adapter,
    or with the one that the run started from.

    The policy's adapter is back on when the context ends, also by an exception.
    """
    if reference is not None:
        yield lambda sequences: reference(*model_inputs(sequences))
        return
    with adapter(module.policy, REFERENCE if REFERENCE in module.policy.peft_config else None):

        def logprobs(sequences: Sequences) -> Float[Tensor, "B R"]:
            logits, _ = response_logits(module.policy, *model_inputs(sequences))
            return ppo.token_logprobs(logits, sequences.responses, module.temperature)

        yield logprobs


@contextlib.contextmanager
def adapter(model: LanguageModel, name: str | None) -> Iterator[None]:
    """The adapter `name` at work instead of the active one, or none at all.

    What was active is so again when the context ends, also by an exception. peft freezes the adapters that it
    switches off; here each parameter goes on learning or not as it did before.
    """
    if name is not None and name == model.active_adapter:
        yield
        return
    before, learns = model.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    with contextlib.ExitStack() as stack:
        stack.callback(_set_learning, learns)
        if name is None:
            stack.enter_context(model.disable_adapter())
        else:
            stack.callback(model.set_adapter, before)
            model.set_adapter(name)
        _set_learning(learns)
        yield


def _set_learning(learns: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, learn in learns:
        parameter.requires_grad_(learn)


def model_inputs(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sequences.queries, sequences.query_mask, sequences.responses, sequences.response_mask


def response_logits(
    model: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> tuple[Float[Tensor, "B R V"], Float[Tensor, "B R H"]]:
    """The logits that each response token was chosen from, and the hidden state under them.

    Only these positions go through the vocabulary layer. The hidden state is taken at that layer's input, so that a
    model's own scaling or capping of logits is kept and no other layer's states are held.
    """
    with vocabulary_inputs(model) as seen:
        inputs = _trunk_inputs(model, queries, query_mask, responses, response_mask)
        # As indices, not as a number: a slice of the trunk's output would be a strided view, for which the CPU's
        # matrix product with the vocabulary falls back to one small product for each row.
        positions = torch.arange(queries.shape[1] - 1, inputs["input_ids"].shape[1] - 1, device=queries.device)
        logits = model(**inputs, **accepted(model, logits_to_keep=positions), use_cache=False).logits
    kept = logits.shape[1] == len(positions)  # False for a model that knows no logits_to_keep
    return (logits, seen[0]) if kept else (logits[:, positions], seen[0][:, positions])


@torch.no_grad()
def logit_sizes(module: PolicyWithValue, sequences: Sequences) -> Float[Tensor, " n"]:
    """For each response token that counts, how large the logits are that its log-probability is made of: its own or the
    row's largest one, whichever is larger without its sign."""
    logits, _ = response_logits(module.policy, *model_inputs(sequences))
    own = logits.gather(-1, sequences.responses[..., None])[..., 0]
    return torch.maximum(own.abs(), logits.amax(-1).abs()).float()[sequences.response_mask]


def response_hidden(
    trunk: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> Float[Tensor, "B R H"]:
    """The last hidden state before each response token, from a transformer without a head."""
    length = responses.shape[1]
    inputs = _trunk_inputs(trunk, queries, query_mask, responses, response_mask)
    hidden: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
    return hidden[:, -length - 1 : -1]


def load_policy(config: Config, path: str, device: torch.device) -> LanguageModel:
    """The causal language model at `path`, dropout off, with fresh LoRA adapters where lora.r says so.

    Raises `ConfigError` when there is no such model or lora.target_modules do not fit it.
    """
    model = _load(AutoModelForCausalLM, config.model, path, **_base_settings(config, device))
    for architecture in model.config.architectures or ():
        if "Classification" in architecture:  # with tied embeddings nothing is missing: it would load and write noise
            raise ConfigError(
                f"model.name_or_path={path}: holds a classifier ({architecture}), not a language model",
                key="model.name_or_path",
            )
    return fitted(model, config)


def fitted(model: LanguageModel, config: Config) -> LanguageModel:
    """A causal language model made ready for a run: checkpointing, kernels and adapters as the config says."""
    model = _checkpointed(model, config)
    if config.run.fast_kernels:
        kernels.quicken(model.get_output_embeddings())
    if config.lora.r == 0:
        return model
    if config.lora.adapter is None:
        model = _with_adapter(model, config, TaskType.CAUSAL_LM)
    else:
        model = _continued(model, config, config.lora.adapter)
    if config.model.critic == "adapter":
        settings = _lora_settings(model.get_base_model(), config, TaskType.CAUSAL_LM, modules_to_save=())
        with _seeded(config.run.seed):
            model.add_adapter(CRITIC, settings)
        model.base_model.set_requires_grad([POLICY, CRITIC], True)
        # By the time of the backward pass, which computes activations again, another adapter may be at work.
        _checkpointed(
            model, config, context_fn=lambda: (contextlib.nullcontext(), adapter(model, model.active_adapter))
        )
    return model


def left_out(model: LanguageModel, config: ModelConfig, path: str) -> str | None:
    """What of the checkpoint at `path` the language model does not hold, as of Llama 4 or Qwen 3.5: transformers loads
    the text part of a model that also sees or hears, and names no weights that it leaves out. None if nothing is."""
    whole = pretrained(AutoConfig, path, trust_remote_code=config.trust_remote_code)
    if whole.model_type == model.config.model_type:
        return None
    names = [name for name in whole.sub_configs if getattr(whole, name, None) is not None]
    other = sorted(name.removesuffix("_config") for name in names if name not in ("text_config", "decoder"))
    return (
        f"of the {whole.model_type} checkpoint only the text part ({model.config.model_type}) is loaded, trained and "
        f"exported; final/ and best/ are without: {', '.join(other) or 'the rest'}"
    )


def loading_settings(config: Config, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` takes to load an export of this run as the policy was loaded."""
    return {**_base_settings(config, device), "trust_remote_code": config.model.trust_remote_code}


def _base_settings(config: Config, device: torch.device) -> dict[str, Any]:
    dtype = resolve_dtype(config, device)
    return {"dtype": dtype, **(_four_bits(device, dtype) if config.model.load_in_4bit else {})}


def logits_of(model: LanguageModel, ids: Int[Tensor, "B L"]) -> Tensor:
    """A model's logits for rows without padding, without a gradient, as `export_is_memory` compares them: (B, L, V) of
    a language model, (B, K) of a classifier."""
    with torch.no_grad():
        mask = torch.ones_like(ids)
        logits: Tensor = model(input_ids=ids, **accepted(model, attention_mask=mask, use_cache=False)).logits
    return logits


def load_export(
    folder: str,
    kind: Any = AutoModelForCausalLM,
    *,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    **settings: Any,
) -> tuple[LanguageModel, list[str]]:
    """The model in a folder as plain transformers, or peft for an adapter, load it, and the names of the tensors that
    the folder lacks, in whose place transformers put new ones. `settings` such as dtype go to `from_pretrained`; what
    it raises is raised.
    """
    if torch.device(device).type != "cpu":
        settings = {"device_map": {"": device}, **settings}
    settings["trust_remote_code"] = trust_remote_code
    with _quiet():
        if (Path(folder) / "adapter_config.json").is_file():
            auto = AutoPeftModelForCausalLM if kind is AutoModelForCausalLM else AutoPeftModelForSequenceClassification
            adapter_config(folder)
            return pretrained(auto, folder, **settings).eval(), []
        model, report = pretrained(kind, folder, output_loading_info=True, **settings)
    return model.eval(), sorted(report["missing_keys"])


def exported_weights(policy: LanguageModel, config: Config, folder: str) -> dict[str, Tensor]:
    """The weights of a full model or an adapter that a run exported to `folder`, by the names that they have in this
    policy. Raises `ConfigError` if they are of another kind of policy or cannot be read."""
    if config.lora.r == 0:
        return dict(_load(AutoModelForCausalLM, config.model, folder, torch.float32, "--which").state_dict())
    # peft's own names in files, found by what becomes of a mark for each tensor.
    marks = {name: torch.empty(0) for name in policy.state_dict()}
    in_files = get_peft_model_state_dict(policy, marks, POLICY, save_embedding_layers=False)
    names = {id(mark): name for name, mark in marks.items()}
    try:
        saved = load_peft_weights(folder, device="cpu")
        return {names[id(mark)]: saved[name] for name, mark in in_files.items()}
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{folder}: holds no adapter of this run ({reason})") from error


def scaled_adapter(weights: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """An adapter's weights, by name, with what they add to the base `scale` times as large.

    From 1 to 0 this is the straight way from the policy back to its base, on which the KL falls faster than the gain:
    about with the square of the scale (Ramé et al. 2024, "WARP", the interpolation towards the initialization).
    """
    ends = {"lora_B", "lora_embedding_B"}
    return {name: weight * scale if ends & set(name.split(".")) else weight for name, weight in weights.items()}


def _continued(model: LanguageModel, config: Config, path: str) -> LanguageModel:
    """The model with the adapter at `path` twice: once to learn, once as the reference."""
    try:
        settings = adapter_config(path, f"lora.adapter={path}")
        if settings.r != config.lora.r:
            raise ConfigError(
                f"lora.r={config.lora.r}, but the adapter at lora.adapter={path} has rank {settings.r}", key="lora.r"
            )
        if settings.modules_to_save and model.dtype != torch.float32:
            raise ConfigError(
                f"lora.adapter={path} has layers that learn in full ({', '.join(settings.modules_to_save)}), and in "
                f"{model.dtype} they would lose small updates to rounding; use model.dtype=fp32",
                key="lora.adapter",
            )
        model = adapted(model, path, adapter_name=POLICY, is_trainable=True)
        model.load_adapter(path, adapter_name=REFERENCE)
        # The adapter may come from another machine: what is exported names the base that it was trained on here.
        model.peft_config[POLICY].base_model_name_or_path = model.get_base_model().name_or_path
    except ConfigError:
        raise
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"lora.adapter={path}: no LoRA adapter for this model ({reason})", key="lora.adapter"
        ) from error
    return _without_dropout(model) if config.lora.dropout == 0 else model


def _with_adapter(model: LanguageModel, config: Config, task: TaskType) -> LanguageModel:
    settings = _lora_settings(model, config, task, config.lora.modules_to_save if task == TaskType.CAUSAL_LM else ())
    try:
        with _seeded(config.run.seed):
            return get_peft_model(model, settings)  # fp32 over a bf16 base: peft's autocast_adapter_dtype
    except ValueError as error:
        targets = config.lora.target_modules
        raise ConfigError(
            f"lora.target_modules={targets}: {str(error).splitlines()[0]}", key="lora.target_modules"
        ) from error


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The adapters' first matrices are random: they follow the run's seed, and nobody else's numbers do."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _lora_settings(
    model: LanguageModel, config: Config, task: TaskType, modules_to_save: Sequence[str]
) -> PeftLoraConfig:
    lora = config.lora
    return PeftLoraConfig(
        task_type=task,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=adapters.targets(model, lora.target_modules),
        modules_to_save=list(modules_to_save) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # GPT-2 keeps its matrices so
    )


# What configs call the number of positions, those of MPT, DBRX and of decoders of speech too; where none is set, or
# positions are none (ALiBi, state spaces), a text may have any length.
_WINDOWS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions")


def window(policy: LanguageModel) -> int | None:
    """How many tokens of a text the policy has positions for; None if its config sets no limit."""
    text = policy.config.get_text_config(decoder=True)
    sizes = (getattr(text, name, None) for name in _WINDOWS)
    most = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    return None if most is None else most - first_position(policy)


def check_window(config: Config, policy: LanguageModel, prefix: int) -> None:
    """Raises `ConfigError` if the longest sample, after `prefix` tokens such as BOS, has more positions than the policy
    knows."""
    most, rollout = window(policy), config.rollout
    needed = prefix + rollout.max_prompt_tokens + rollout.max_new_tokens
    if most is not None and needed > most:
        raise ConfigError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and rollout.max_new_tokens="
            f"{rollout.max_new_tokens} make up to {needed} tokens, and the policy has {most} positions; lower one",
            key="rollout.max_prompt_tokens",
            positions=most,
        )


def check_prompts(
    policy: LanguageModel, texts: Sequence[str], lengths: Sequence[int], new_tokens: int, key: str
) -> None:
    """Raises `ConfigError` naming the first of these prompts, `lengths` tokens long, that with a response of
    `new_tokens`, which `key` sets, has more positions than the policy knows."""
    most = window(policy)
    for number, (text, length) in enumerate(zip(texts, lengths, strict=True), start=1):
        if most is not None and length + new_tokens > most:
            raise ConfigError(
                f"prompt {number} of {len(texts)} ({text!r:.40}) has {length} tokens, which with {key}={new_tokens} is "
                f"above the policy's {most} positions; shorten it or lower {key}",
                key=key,
                prompt=number,
                positions=most,
            )


def load_reference(config: Config, policy: LanguageModel) -> Reference | None:
    """A frozen copy of the freshly loaded policy; None with LoRA, where the base is the reference."""
    return None if config.lora.r else Reference(copy.deepcopy(policy), config.rollout.temperature)


def build(config: Config, policy: LanguageModel, policy_path: str, reward_path: str | None) -> PolicyWithValue:
    """The policy with the critic that model.critic asks for.

    Raises `ConfigError` if the critic cannot start from the reward model: other architecture or other vocabulary.
    """
    if config.model.critic in ("head", "adapter"):
        return with_critic(config, policy, None)
    dtype = policy.get_base_model().dtype if config.lora.r else torch.float32
    if config.model.critic_init == "policy":
        critic = _load(AutoModel, config.model, policy_path, dtype)
    else:
        assert reward_path is not None, "checked by the config"
        classifier = _load(AutoModelForSequenceClassification, config.model, reward_path, dtype, "reward.model")
        ours, theirs = policy.config, classifier.config
        if (ours.model_type, ours.vocab_size) != (theirs.model_type, theirs.vocab_size):
            raise ConfigError(
                f"model.critic_init=reward: the reward model ({theirs.model_type}, vocabulary {theirs.vocab_size}) "
                f"does not read what the policy writes ({ours.model_type}, {ours.vocab_size}); use "
                "model.critic_init=policy",
                key="model.critic_init",
            )
        critic = classifier.base_model
    return with_critic(config, policy, critic)


def with_critic(
    config: Config, policy: LanguageModel, critic: LanguageModel | None, width: int | None = None
) -> PolicyWithValue:
    """The policy with its value head, which reads `critic`, a transformer as loaded, or the policy's own trunk."""
    if critic is not None:
        critic = _checkpointed(critic, config)
        if config.lora.r:
            critic = _with_adapter(critic, config, TaskType.FEATURE_EXTRACTION)
    return PolicyWithValue(policy, critic, config.rollout.temperature, width)


def load_pretrained(kind: Any, path: str, said: str, *, trust_remote_code: bool, **settings: Any) -> Any:
    """`kind.from_pretrained(path)`, for one of transformers' Auto classes, without its report of unused weights.

    Raises `ConfigError`, which begins with `said`, when nothing can be loaded, or when a head would be random because
    the folder holds none, of which transformers only warns.
    """
    settings |= {"trust_remote_code": trust_remote_code, "output_loading_info": True}
    try:
        with _quiet():
            model, report = pretrained(kind, path, said=said, **settings)
    except ConfigError:
        raise
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{said}: no such model could be loaded ({reason})", key=key_in(said)) from error
    missing = sorted(report["missing_keys"])
    if missing and kind is not AutoModel:  # a trunk may lack a pooler, which nobody reads
        raise ConfigError(
            f"{said}: is no {type(model).__name__}; {len(missing)} weights are missing ({missing[0]}, …)",
            key=key_in(said),
        )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of weights that a folder holds and a model lacks, or the other way round."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def freeze_unreached(module: PolicyWithValue) -> list[str]:
    """Freeze what a text has no way to, such as a vision tower or a head that is not asked, and return the names: a
    gradient never comes, for which data parallelism would wait.

    Found by one small pass and the graph that autograd made of it. Experts that were not chosen are no such case, as
    long as others are like them.
    """
    device = next(module.parameters()).device
    ids = torch.full((1, 2), 1, device=device)
    said = module(ids, torch.ones_like(ids, dtype=torch.bool), ids, torch.ones_like(ids, dtype=torch.bool))
    reached = _leaves(said.logprobs.sum() + said.values.sum())
    learned = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    if not any(name.startswith("policy.") and id(parameter) in reached for name, parameter in learned.items()):
        return []  # not a part of the model, but a fault, which the doctor's look at the gradient finds
    alike = {re.sub(r"\d+", "*", name) for name, parameter in learned.items() if id(parameter) in reached}
    unreached = [name for name, parameter in learned.items() if id(parameter) not in reached]
    frozen = [name for name in unreached if "expert" not in name or re.sub(r"\d+", "*", name) not in alike]
    for name in frozen:
        learned[name].requires_grad_(False)
    return frozen


def _leaves(result: Tensor) -> set[int]:
    """The ids of all parameters that this was computed from."""
    nodes, seen, found = [result.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [function for function, _ in node.next_functions]
    return found


@contextlib.contextmanager
def learning(module: nn.Module, config: Config) -> Iterator[None]:
    """Training mode for those layers that need it, while the context lasts: checkpointed ones look at it, and dropout
    of adapters. All others stay in evaluation mode, in which they sampled: routers add noise in training, and other
    layers take other branches."""
    layers: list[nn.Module] = []
    if config.model.gradient_checkpointing:
        marked = [layer for layer in module.modules() if getattr(layer, "gradient_checkpointing", False)]
        # Models of before GradientCheckpointingLayer checkpoint layers themselves.
        layers += [layer for layer in marked if isinstance(layer, GradientCheckpointingLayer)] or marked
    if config.lora.dropout > 0:
        for layer in module.modules():
            if isinstance(layer, BaseTunerLayer):
                layers += [layer, *getattr(layer, "lora_dropout", nn.ModuleDict()).modules()]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def parameter_groups(module: PolicyWithValue, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: the policy's at optim.lr, the critic's own at optim.critic_lr; weight decay on
    matrices only."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            of_policy = name.startswith("policy.") and CRITIC not in name.split(".")
            groups.setdefault((of_policy, parameter.ndim >= 2), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.lr if of_policy or optim.critic_lr is None else optim.critic_lr,
            "weight_decay": optim.weight_decay if is_matrix else 0.0,
        }
        for (of_policy, is_matrix), parameters in groups.items()
    ]


def resolve_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype that model.dtype asks for; auto is bf16 for a frozen LoRA base where the device computes in it."""
    if config.model.dtype != "auto":
        return DTYPES[config.model.dtype]
    frozen = config.lora.r > 0 and not config.lora.modules_to_save
    return torch.bfloat16 if frozen and computes_in_bf16(device) else torch.float32


def end_of_text_ids(model: LanguageModel) -> list[int]:
    """Ids that the model's generation config says end a text; chat models often have several."""
    ids = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]


def _trunk_inputs(
    model: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    mask = torch.cat([query_mask, response_mask], dim=1).long()
    return {
        "input_ids": torch.cat([queries, responses], dim=1),
        "attention_mask": mask,
        **accepted(model, position_ids=position_ids(mask, first_position(model))),
    }


def _checkpointed(model: LanguageModel, config: Config, **settings: Any) -> LanguageModel:
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False, **settings})
        if config.lora.r:
            model.enable_input_require_grads()
    return model


def _four_bits(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` takes for a base in 4 bits on `device` that computes in `dtype`."""
    if device.type != "cuda":
        raise ConfigError("model.load_in_4bit=true needs a CUDA GPU; leave it out here", key="model.load_in_4bit")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.load_in_4bit=true needs bitsandbytes; pip install 'rlhf_accel[qlora]'", key="model.load_in_4bit"
        )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _load(
    kind: Any, config: ModelConfig, path: str, dtype: torch.dtype, key: str = "model.name_or_path", **settings: Any
) -> Any:
    settings |= {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
    model = load_pretrained(kind, path, f"{key}={path}", **settings)
    return _without_dropout(model).eval()


def _without_dropout(model: nn.Module) -> nn.Module:
    """Dropout would make the first ratio of an update differ from 1. The saved config keeps its own figures."""
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
        for name, value in vars(layer).items():
            if "drop" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
    return model
