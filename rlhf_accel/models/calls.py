"""Calls of language models of any family: arguments of their forward, logits and hidden states of responses.

Knows transformers. Knows no tokenizer and no rank.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_accel.algorithm.batches import Sequences
from rlhf_accel.models.loading import LanguageModel
from rlhf_accel.models.masks import mask_of
from rlhf_accel.models.positions import first_position, position_ids


def accepted(model: Any, **extras: Any) -> dict[str, Any]:
    """The keyword arguments among these that the model's forward has.

    Models with ALiBi have no position_ids, older ones no logits_to_keep.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(base.forward).parameters
    return {name: value for name, value in extras.items() if name in known}


@contextlib.contextmanager
def vocabulary_inputs(model: Any) -> Iterator[list[Tensor]]:
    """A list to which each call of the model appends the input of its vocabulary layer, (B, L, H)."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()


def model_inputs(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return sequences.queries, sequences.query_mask, sequences.responses, sequences.response_mask


def response_logits(
    model: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> tuple[Float[Tensor, "B R V"], Float[Tensor, "B R H"]]:
    """The logits from which each response token was chosen, and the hidden states that they were computed from.

    Only these positions go through the vocabulary layer. Hidden states are taken at its input, which keeps a model's
    own scaling or capping of logits and does not store the states of other layers.
    """
    with vocabulary_inputs(model) as seen:
        inputs = trunk_inputs(model, queries, query_mask, responses, response_mask)
        # Indices instead of a number: a slice of the trunk's output would be a strided view, for which the matrix
        # product with the vocabulary falls back to one small product per row on a CPU.
        positions = torch.arange(queries.shape[1] - 1, inputs["input_ids"].shape[1] - 1, device=queries.device)
        logits = model(**inputs, **accepted(model, logits_to_keep=positions), use_cache=False).logits
    kept = logits.shape[1] == len(positions)  # False for a model without logits_to_keep
    return (logits, seen[0]) if kept else (logits[:, positions], seen[0][:, positions])


def response_hidden(
    trunk: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> Float[Tensor, "B R H"]:
    """The last hidden state before each response token, from a transformer without a head."""
    length = responses.shape[1]
    inputs = trunk_inputs(trunk, queries, query_mask, responses, response_mask)
    hidden: Tensor = trunk(**inputs, use_cache=False).last_hidden_state
    return hidden[:, -length - 1 : -1]


def logits_of(model: LanguageModel, ids: Int[Tensor, "B L"]) -> Tensor:
    """A model's logits for rows without padding, without gradients: (B, L, V), or (B, K) of a classifier."""
    with torch.no_grad():
        mask = torch.ones_like(ids)
        logits: Tensor = model(input_ids=ids, **accepted(model, attention_mask=mask, use_cache=False)).logits
    return logits


def trunk_inputs(
    model: LanguageModel, queries: Tensor, query_mask: Tensor, responses: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    mask = mask_of(query_mask, response_mask).long()
    return {
        "input_ids": torch.cat([queries, responses], dim=1),
        "attention_mask": mask,
        **accepted(model, position_ids=position_ids(mask, first_position(model))),
    }
