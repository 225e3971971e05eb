"""Policy and critic as one module, LoRA, and the reference. Knows transformers and peft, no tokenizer and no rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from rlhf_accel import ppo
from rlhf_accel.config import Config, ConfigError, ModelConfig, OptimConfig
from rlhf_accel.decoding import accepted, position_ids
from rlhf_accel.runtime import computes_in_bf16
from rlhf_accel.types import Sequences, TokenOutputs

# A model of transformers, or one that peft wrapped: an nn.Module with more methods than types can tell.
LanguageModel = Any

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PolicyWithValue(nn.Module):
    """A causal language model with a critic, prepared and optimised as one.

    `critic` is None when the value head reads the policy's own trunk; otherwise it is a transformer without a head.
    The value head starts at zero (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"): values say
    nothing until they have learnt something, and every world size starts from the same ones.
    """

    def __init__(self, policy: LanguageModel, critic: LanguageModel | None, temperature: float) -> None:
        super().__init__()
        self.policy: LanguageModel = policy
        self.critic: LanguageModel | None = critic
        self.temperature = temperature
        width = policy.get_output_embeddings().in_features if critic is None else critic.config.hidden_size
        self.value_head = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

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
        if self.critic is not None:
            hidden = response_hidden(self.critic, *inputs)
        # fp32 whatever the trunk computes in: the head is small and its targets are fine-grained.
        with torch.autocast(hidden.device.type, enabled=False):
            values = self.value_head(hidden.float())[..., 0]
        return TokenOutputs(logprobs=logprobs, values=values, entropy=entropy)

    def is_lora(self) -> bool:
        return hasattr(self.policy, "disable_adapter")


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
    """The reference as a function of sequences: the frozen copy if there is one, else the policy without its adapter.

    The adapter is back on when the context ends, also by an exception.
    """
    if reference is not None:
        yield lambda sequences: reference(*model_inputs(sequences))
        return
    with module.policy.disable_adapter():

        def logprobs(sequences: Sequences) -> Float[Tensor, "B R"]:
            logits, _ = response_logits(module.policy, *model_inputs(sequences))
            return ppo.token_logprobs(logits, sequences.responses, module.temperature)

        yield logprobs


def model_inputs(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sequences.queries, sequences.query_mask, sequences.responses, sequences.response_mask


def response_logits(
    model: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> tuple[Float[Tensor, "B R V"], Float[Tensor, "B R H"]]:
    """The logits that each response token was chosen from, and the hidden state under them.

    Only these positions go through the vocabulary layer. The hidden state is taken at that layer's input, so that a
    model's own scaling or capping of logits is kept and no other layer's states are held.
    """
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        inputs = _trunk_inputs(model, queries, query_mask, responses, response_mask)
        # As indices, not as a number: a slice of the trunk's output would be a strided view, for which the CPU's
        # matrix product with the vocabulary falls back to one small product for each row.
        positions = torch.arange(queries.shape[1] - 1, inputs["input_ids"].shape[1] - 1, device=queries.device)
        logits = model(**inputs, **accepted(model, logits_to_keep=positions), use_cache=False).logits
    finally:
        handle.remove()
    kept = logits.shape[1] == len(positions)  # False for a model that knows no logits_to_keep
    return (logits, seen[0]) if kept else (logits[:, positions], seen[0][:, positions])


def response_hidden(
    trunk: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> Float[Tensor, "B R H"]:
    """The last hidden state before each response token, from a transformer without a head."""
    length = responses.shape[1]
    inputs = _trunk_inputs(trunk, queries, query_mask, responses, response_mask)
    return trunk(**inputs, use_cache=False).last_hidden_state[:, -length - 1 : -1]


def load_policy(config: Config, path: str, device: torch.device) -> LanguageModel:
    """The causal language model at `path`, dropout off, with fresh LoRA adapters where lora.r says so.

    Raises `ConfigError` when there is no such model or lora.target_modules do not fit it.
    """
    model = _load(AutoModelForCausalLM, config.model, path, resolve_dtype(config, device))
    for architecture in model.config.architectures or ():
        if "Classification" in architecture:  # with tied embeddings nothing is missing: it would load and write noise
            raise ConfigError(f"model.name_or_path={path}: holds a classifier ({architecture}), not a language model")
    _checkpointed(model, config.model)
    if config.lora.r == 0:
        return model
    if config.model.gradient_checkpointing:
        model.enable_input_require_grads()
    targets = config.lora.target_modules
    settings = PeftLoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets[0] if targets == ("all-linear",) else (list(targets) if targets else None),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in model.modules()),  # GPT-2 keeps its matrices so
    )
    try:
        # The adapters' first matrices are random: they follow the run's seed, and nobody else's numbers do.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            return get_peft_model(model, settings)  # fp32 over a bf16 base: peft's autocast_adapter_dtype
    except ValueError as error:
        raise ConfigError(f"lora.target_modules={targets}: {str(error).splitlines()[0]}") from error


def check_window(config: Config, policy: LanguageModel, prefix: int) -> None:
    """Raises `ConfigError` if the longest sample, after `prefix` tokens such as BOS, has more positions than the policy
    knows."""
    window = getattr(policy.config, "max_position_embeddings", None)
    rollout = config.rollout
    needed = prefix + rollout.max_prompt_tokens + rollout.max_new_tokens
    if window is not None and needed > window:
        raise ConfigError(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} and rollout.max_new_tokens="
            f"{rollout.max_new_tokens} make up to {needed} tokens, and the policy has {window} positions; lower one"
        )


def load_reference(config: Config, policy: LanguageModel) -> Reference | None:
    """A frozen copy of the freshly loaded policy; None with LoRA, where the base is the reference."""
    return None if config.lora.r else Reference(copy.deepcopy(policy), config.rollout.temperature)


def build(config: Config, policy: LanguageModel, policy_path: str, reward_path: str | None) -> PolicyWithValue:
    """The policy with the critic that model.critic asks for.

    Raises `ConfigError` if the critic cannot start from the reward model: other architecture or other vocabulary.
    """
    if config.model.critic == "head":
        return PolicyWithValue(policy, None, config.rollout.temperature)
    if config.model.critic_init == "policy":
        critic = _checkpointed(_load(AutoModel, config.model, policy_path, torch.float32), config.model)
        return PolicyWithValue(policy, critic, config.rollout.temperature)
    assert reward_path is not None, "checked by the config"
    classifier = _load(AutoModelForSequenceClassification, config.model, reward_path, torch.float32, "reward.model")
    ours, theirs = policy.config, classifier.config
    if (ours.model_type, ours.vocab_size) != (theirs.model_type, theirs.vocab_size):
        raise ConfigError(
            f"model.critic_init=reward: the reward model ({theirs.model_type}, vocabulary {theirs.vocab_size}) does "
            f"not read what the policy writes ({ours.model_type}, {ours.vocab_size}); use model.critic_init=policy"
        )
    return PolicyWithValue(policy, _checkpointed(classifier.base_model, config.model), config.rollout.temperature)


def load_pretrained(kind: Any, path: str, said: str, **settings: Any) -> Any:
    """`kind.from_pretrained(path)`, for one of transformers' Auto classes, without its report of unused weights.

    Raises `ConfigError`, which begins with `said`, when nothing can be loaded, or when a head would be random because
    the folder holds none, of which transformers only warns.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, report = kind.from_pretrained(path, output_loading_info=True, **settings)
    except Exception as error:  # a missing, broken or foreign file raises many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{said}: no such model could be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
    missing = sorted(report["missing_keys"])
    if missing and kind is not AutoModel:  # a trunk may lack a pooler, which nobody reads
        raise ConfigError(f"{said}: is no {type(model).__name__}; {len(missing)} weights are missing ({missing[0]}, …)")
    return model


def parameter_groups(module: PolicyWithValue, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters for AdamW: the policy's at optim.lr, the critic's own at optim.critic_lr; weight decay on
    matrices only."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("policy."), parameter.ndim >= 2), []).append(parameter)
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
    return torch.bfloat16 if config.lora.r and computes_in_bf16(device) else torch.float32


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
        **accepted(model, position_ids=position_ids(mask)),
    }


def _checkpointed(model: Any, config: ModelConfig) -> Any:
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _load(kind: Any, config: ModelConfig, path: str, dtype: torch.dtype, key: str = "model.name_or_path") -> Any:
    model = load_pretrained(kind, path, f"{key}={path}", dtype=dtype, trust_remote_code=config.trust_remote_code)
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
