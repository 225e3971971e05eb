"""Attention masks of which the host has a copy: transformers asks the copy. A mask on `meta` has no values to ask."""

import pytest
import torch
from transformers import masking_utils

from rlhf_accel.models.masks import known_mask, mask_of
from tests.test_batches import make_sequences

GPU = torch.device("cuda")
UNREADABLE = torch.ones(2, 5, dtype=torch.bool, device="meta")


def is_left_out(mask: torch.Tensor) -> bool:
    """Whether transformers leaves this mask out of the attention of the newest token."""
    length = mask.shape[1]
    return bool(masking_utils._ignore_causal_mask_sdpa(mask, 1, length, length - 1, 0))


@pytest.mark.parametrize("padded", [True, False])
def test_the_copy_is_asked_in_place_of_the_mask(padded: bool) -> None:
    copy = torch.ones(2, 5, dtype=torch.int64)
    copy[0, 0] = 0 if padded else 1
    with known_mask(copy, GPU):
        assert is_left_out(UNREADABLE) is not padded
        assert masking_utils._ignore_bidirectional_mask_sdpa(UNREADABLE, 5, None) == (not padded)


def test_a_mask_of_another_shape_is_asked_itself() -> None:
    with known_mask(torch.zeros(2, 4), GPU):
        assert is_left_out(torch.ones(2, 5, dtype=torch.bool))


def test_outside_of_the_context_and_on_a_cpu_the_mask_is_asked_itself() -> None:
    with known_mask(torch.zeros(2, 5), GPU), known_mask(torch.ones(2, 5), GPU):
        pass
    assert is_left_out(torch.ones(2, 5, dtype=torch.bool))
    with known_mask(torch.zeros(2, 5), torch.device("cpu")):
        assert is_left_out(torch.ones(2, 5, dtype=torch.bool))


def test_the_inner_of_two_contexts_counts_and_then_the_outer_again() -> None:
    with known_mask(torch.ones(2, 5), GPU):
        with known_mask(torch.zeros(2, 5), GPU):
            assert not is_left_out(UNREADABLE)
        assert is_left_out(UNREADABLE)


def test_the_mask_of_sequences_is_that_of_queries_and_responses() -> None:
    sequences = make_sequences([[1]], [[2]], width=2, length=2)
    assert mask_of(sequences.query_mask, sequences.response_mask).tolist() == [[False, True, True, False]]
