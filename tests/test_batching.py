"""Micro-batches: they matter for memory and for ranks, not for what is trained."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_accel.distributed.batching import cut_by_tokens, cut_micro_batches

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20)


@given(LENGTHS, st.integers(18, 100), st.integers(1, 4))
def test_each_row_is_in_one_micro_batch_and_each_rank_has_equally_many(
    lengths: list[tuple[int, int]], budget: int, ranks: int
) -> None:
    queries, responses = torch.tensor(lengths).T
    rows = torch.arange(len(lengths)).flip(0)[::2]  # a minibatch: some rows in another order
    parts = cut_micro_batches(queries, responses, rows, budget, ranks)
    assert len(parts) == ranks
    assert len({len(batches) for batches in parts}) == 1
    assert sorted(int(row) for batches in parts for batch in batches for row in batch) == sorted(rows.tolist())


@given(LENGTHS, st.integers(18, 100), st.integers(1, 4))
def test_the_budget_bounds_the_tokens_of_a_pass_with_its_padding(
    lengths: list[tuple[int, int]], budget: int, ranks: int
) -> None:
    queries, responses = torch.tensor(lengths).T
    for batches in cut_micro_batches(queries, responses, torch.arange(len(lengths)), budget, ranks):
        for batch in batches:
            width = int(queries[batch].max() + responses[batch].max()) if len(batch) else 0
            assert len(batch) * width <= budget


def test_a_row_above_the_budget_is_a_micro_batch_of_its_own() -> None:
    parts = cut_micro_batches(torch.tensor([60, 4]), torch.tensor([4, 60]), torch.arange(2), 10, 1)
    assert [batch.tolist() for batch in parts[0]] == [[0], [1]]


def test_a_long_query_and_a_long_response_do_not_share_a_pass() -> None:
    """Each row alone is 64 tokens, but together they are padded to 2 x 120."""
    parts = cut_micro_batches(torch.tensor([60, 4]), torch.tensor([4, 60]), torch.arange(2), 128, 1)
    assert len(parts[0]) == 2


def test_ranks_have_similar_loads() -> None:
    responses = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    one, other = cut_micro_batches(torch.ones(8, dtype=torch.int64), responses, torch.arange(8), 1000, 2)
    assert abs(int(responses[one[0]].sum()) - int(responses[other[0]].sum())) <= 4


def test_very_different_lengths_need_little_padding() -> None:
    random = torch.Generator().manual_seed(0)
    queries = torch.full((64,), 8)
    responses = torch.randint(1, 30, (64,), generator=random)
    responses[:2] = torch.tensor([96, 70])
    passes = cut_by_tokens(queries, responses, [torch.arange(64)], 832)[0]
    real = int((queries + responses).sum())
    padded = sum(len(rows) * int((queries + responses)[rows].max()) for rows in passes)
    assert sorted(torch.cat(passes).tolist()) == list(range(64))
    assert all(len(rows) * int((queries + responses)[rows].max()) <= 832 for rows in passes)
    assert padded < 1.25 * real
    assert len(passes) <= 6, "passes of few rows need no padding, but each has a cost"


def test_rows_of_one_length_make_the_fewest_passes() -> None:
    lengths = torch.full((20,), 16)
    passes = cut_by_tokens(lengths, lengths, [torch.arange(20)], 256)[0]
    assert [len(rows) for rows in passes] == [8, 8, 4]


def test_shares_have_equally_many_passes_and_keep_their_rows() -> None:
    queries, responses = torch.full((7,), 4), torch.tensor([90, 3, 40, 5, 5, 5, 5])
    shares = [torch.arange(4), torch.arange(4, 7), torch.arange(0)]
    cuts = cut_by_tokens(queries, responses, shares, 100)
    assert {len(passes) for passes in cuts} == {3}
    for share, passes in zip(shares, cuts, strict=True):
        assert sorted(torch.cat(passes).tolist()) == share.tolist()
