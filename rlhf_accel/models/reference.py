"""The reference policy: a frozen copy, or with LoRA the policy without its adapter. Knows no tokenizer and no rank."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator

from jaxtyping import Float
from torch import Tensor, nn

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.algorithm.logprobs import token_logprobs
from rlhf_accel.config.schema import Config
from rlhf_accel.models import calls
from rlhf_accel.models.loading import LanguageModel
from rlhf_accel.models.lora import REFERENCE, adapter
from rlhf_accel.models.policy_with_value import PolicyWithValue


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
        logits, _ = calls.response_logits(self.policy, queries, query_mask, responses, response_mask)
        return token_logprobs(logits, responses, self.temperature)


@contextlib.contextmanager
def reference_policy(
    module: PolicyWithValue, reference: nn.Module | None
) -> Iterator[Callable[[Sequences], Float[Tensor, "B R"]]]:
    """The reference as a function of sequences.

    It is the frozen copy if there is one, else the policy without its adapter, or with the adapter that the run started
    from. The policy's adapter is active again after the context, also after an exception.
    """
    if reference is not None:
        yield lambda sequences: reference(*calls.model_inputs(sequences))
        return
    with adapter(module.policy, REFERENCE if REFERENCE in module.policy.peft_config else None):

        def logprobs(sequences: Sequences) -> Float[Tensor, "B R"]:
            logits, _ = calls.response_logits(module.policy, *calls.model_inputs(sequences))
            return token_logprobs(logits, sequences.responses, module.temperature)

        yield logprobs


def load_reference(config: Config, policy: LanguageModel) -> Reference | None:
    """A frozen copy of the loaded policy; None with LoRA, where the base is the reference."""
    return None if config.lora.r else Reference(copy.deepcopy(policy), config.rollout.temperature)
