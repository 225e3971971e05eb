"""Policy and value model as one module, prepared and optimized as one. Knows no tokenizer and no rank."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Float
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoModel

from rlhf_accel.algorithm.batches import Sequences, TokenOutputs
from rlhf_accel.algorithm.logprobs import token_entropy, token_logprobs
from rlhf_accel.config.schema import Config
from rlhf_accel.models import calls
from rlhf_accel.models.loading import LanguageModel, load_model, trunk_of, without_dropout
from rlhf_accel.models.lora import CRITIC, adapter, with_adapter
from rlhf_accel.models.policy import with_checkpointing
from rlhf_accel.models.unmerged import load_classifier
from rlhf_accel.system.errors import ConfigError


class ValueHead(nn.Module):
    """A scalar for each hidden state, in fp32 in every precision: it is small, and its targets need the precision.

    Initialized to zero (Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"), so that untrained values
    carry no information, and every world size starts from the same weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Float[Tensor, "B R H"]) -> Float[Tensor, "B R"]:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)[..., 0]


class PolicyWithValue(nn.Module):
    """A causal language model and its value model in one module.

    The value head reads `critic`, a transformer without a head. If that is None, it reads the policy's own trunk: with
    the policy's adapter, or with the adapter `CRITIC` if the policy has one. Without a value head there is no value
    model.
    """

    value_head: ValueHead | None

    def __init__(
        self,
        policy: LanguageModel,
        critic: LanguageModel | None,
        temperature: float,
        width: int | None = None,
        *,
        has_critic: bool = True,
    ) -> None:
        """`width` is the size of the hidden states that the head reads; None measures it."""
        super().__init__()
        self.policy: LanguageModel = policy
        self.critic: LanguageModel | None = critic
        self.temperature = temperature
        self.value_head = None
        if has_critic:
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
        """Log-probability, value and, with `with_entropy`, entropy of each response token; shapes as in `Sequences`.

        The value of a token is computed from the hidden state before it, from which the policy chose it.
        """
        inputs = (queries, query_mask, responses, response_mask)
        logits, hidden = calls.response_logits(self.policy, *inputs)
        logprobs = token_logprobs(logits, responses, self.temperature)
        entropy = token_entropy(logits, self.temperature) if with_entropy else None
        values = None
        if self.value_head is not None:
            values = self.value_head(hidden) if self.critic_reads_policy else self.values(*inputs)
        return TokenOutputs(logprobs=logprobs, values=values, entropy=entropy)

    def states_width(self) -> int:
        """Size of the hidden states that the head reads.

        For a trunk of its own it is measured by a forward pass: some trunks project their states (OPT-350m), some
        vocabulary layers read others (RemBERT), and configs with sub-configs have several sizes.
        """
        if self.critic_reads_policy:
            return int(self.policy.get_output_embeddings().in_features)
        with self.critic_trunk() as trunk, torch.no_grad():
            ids = torch.ones(1, 2, dtype=torch.int64, device=next(trunk.parameters()).device)
            states = trunk(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            return int(states.shape[-1])

    @property
    def has_critic(self) -> bool:
        return self.value_head is not None

    @property
    def critic_reads_policy(self) -> bool:
        """Whether the value head reads the same hidden states as the policy's vocabulary layer."""
        return self.critic is None and CRITIC not in getattr(self.policy, "peft_config", ())

    def values(
        self, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
    ) -> Float[Tensor, "B R"]:
        """The values alone, for a value model that has a forward pass of its own."""
        assert self.value_head is not None, "no value model"
        with self.critic_trunk() as trunk:
            states = calls.response_hidden(trunk, queries, query_mask, responses, response_mask)
            values: Tensor = self.value_head(states)
            return values

    @contextlib.contextmanager
    def critic_trunk(self) -> Iterator[LanguageModel]:
        """The transformer of such a value model, with the adapter `CRITIC` active inside the context."""
        if self.critic is not None:
            yield self.critic
            return
        with adapter(self.policy, CRITIC):
            yield trunk_of(self.policy.get_base_model())


@torch.no_grad()
def logit_sizes(module: PolicyWithValue, sequences: Sequences) -> Float[Tensor, " n"]:
    """The size of the logits behind each response token's log-probability, for tokens in the mask.

    It is the larger of the absolute values of the token's own logit and of the largest logit at its position.
    """
    logits, _ = calls.response_logits(module.policy, *calls.model_inputs(sequences))
    own = logits.gather(-1, sequences.responses[..., None])[..., 0]
    return torch.maximum(own.abs(), logits.amax(-1).abs()).float()[sequences.response_mask]


def build(
    config: Config, policy: LanguageModel, policy_path: str, reward_path: str | None, *, critic: bool = True
) -> PolicyWithValue:
    """The policy with the value model of model.critic, or without any if `critic` is False.

    Raises `ConfigError` if the value model cannot be initialized from the reward model, because its architecture or
    vocabulary differs.
    """
    if not critic:
        return PolicyWithValue(policy, None, config.rollout.temperature, has_critic=False)
    if config.model.critic in ("head", "adapter"):
        return with_critic(config, policy, None)
    dtype = policy.get_base_model().dtype if config.lora.r else torch.float32
    if config.model.critic_init == "policy":
        trunk = load_model(AutoModel, config.model, policy_path, dtype)
    else:
        assert reward_path is not None, "checked by the config"
        trusted, setting = config.model.trust_remote_code, f"reward.model={reward_path}"
        classifier: LanguageModel = load_classifier(reward_path, setting, trust_remote_code=trusted, dtype=dtype)
        without_dropout(classifier).eval()
        ours, theirs = policy.config, classifier.config
        if (ours.model_type, ours.vocab_size) != (theirs.model_type, theirs.vocab_size):
            raise ConfigError(
                f"model.critic_init=reward: the reward model ({theirs.model_type}, vocabulary {theirs.vocab_size}) "
                f"does not read the tokens of the policy ({ours.model_type}, {ours.vocab_size}); use "
                "model.critic_init=policy",
                key="model.critic_init",
            )
        trunk = classifier.base_model
    return with_critic(config, policy, trunk)


def with_critic(
    config: Config, policy: LanguageModel, critic: LanguageModel | None, width: int | None = None
) -> PolicyWithValue:
    """The policy with a value head that reads `critic`, a transformer as loaded, or if None the policy's own trunk."""
    if critic is not None:
        critic = with_checkpointing(critic, config)
        if config.lora.r:
            critic = with_adapter(critic, config, TaskType.FEATURE_EXTRACTION)
    return PolicyWithValue(policy, critic, config.rollout.temperature, width)
