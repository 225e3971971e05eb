"""Cut rows into micro-batches by their number of tokens, and deal them to ranks.

Pure functions of lengths: they know no process, no model and no text. B is the number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

# The cost of a forward pass, however few tokens it has, as a share of the cost of a full one.
_COST_OF_A_PASS = 1 / 16


def contiguous_shares(count: int, world_size: int) -> list[Int[Tensor, " n"]]:
    """Each rank's share of `count` rows: contiguous, the first ranks one row longer where it does not divide.

    >>> contiguous_shares(5, 2)
    [tensor([0, 1, 2]), tensor([3, 4])]
    """
    return [torch.from_numpy(rows) for rows in np.array_split(np.arange(count), world_size)]


def cut_micro_batches(
    query_lengths: Int[Tensor, " B"],
    response_lengths: Int[Tensor, " B"],
    rows: Int[Tensor, " n"],
    budget: int,
    world_size: int,
) -> list[list[Int[Tensor, " m"]]]:
    """Cut a minibatch into micro-batches: a list of row tensors for each rank, equally many on every rank.

    Rows are sorted by length and dealt to the ranks in turn, so that the ranks have similar loads and a micro-batch has
    little padding. `budget` bounds the tokens of a pass as in `cut_by_tokens`. A rank with fewer passes than others
    ends with empty micro-batches, which keep it in step.

    >>> cut_micro_batches(torch.tensor([2, 1, 2, 1, 1]), torch.tensor([7, 0, 3, 4, 1]), torch.arange(5), 40, 1)
    [[tensor([0]), tensor([2, 3]), tensor([4, 1])]]
    """
    lengths = query_lengths + response_lengths
    ordered = rows[torch.argsort(lengths[rows], descending=True, stable=True)]
    shares = [ordered[rank::world_size] for rank in range(world_size)]
    return cut_by_tokens(query_lengths, response_lengths, shares, budget)


def cut_by_tokens(
    query_lengths: Int[Tensor, " B"],
    response_lengths: Int[Tensor, " B"],
    shares: Sequence[Int[Tensor, " n"]],
    budget: int,
) -> list[list[Int[Tensor, " m"]]]:
    """Cut the rows of each share, longest first, into the cheapest passes; equally many for every share.

    The cost of a pass is its number of tokens with padding, rows x (longest query + longest response), plus a constant
    of `budget` / 16. `budget` bounds the tokens of a pass, but a single row always fits. A share with fewer passes
    than others ends with empty ones.

    >>> cut_by_tokens(torch.ones(6).long(), torch.tensor([90, 9, 9, 9, 8, 8]), [torch.arange(6)], 300)
    [[tensor([0]), tensor([1, 2, 3, 4, 5])]]
    """
    lengths = query_lengths + response_lengths
    cuts = []
    for share in shares:
        ordered = share[torch.argsort(lengths[share], descending=True, stable=True)]
        ends = _cheapest_cuts(query_lengths[ordered].numpy(), response_lengths[ordered].numpy(), budget)
        cuts.append([ordered[start:end] for start, end in zip([0, *ends], ends, strict=False)])
    most = max(len(passes) for passes in cuts)
    return [passes + [query_lengths.new_zeros(0)] * (most - len(passes)) for passes in cuts]


def _cheapest_cuts(queries: np.ndarray, responses: np.ndarray, budget: int) -> list[int]:
    """The end of each pass, such that the passes over these sorted rows cost least; by dynamic programming."""
    count = len(queries)
    most = max(budget // max(int((queries + responses).min(initial=budget)), 1), 1)  # rows that a pass may hold
    cost, ends = np.zeros(count + 1), np.zeros(count + 1, dtype=int)  # of the rows from each one on
    for start in reversed(range(count)):
        rows = slice(start, start + most)
        widths = np.maximum.accumulate(queries[rows]) + np.maximum.accumulate(responses[rows])
        tokens = widths * np.arange(1, len(widths) + 1)
        fit = max(int((tokens <= budget).sum()), 1)  # tokens grow with each row: the passes that fit come first
        total = (tokens[:fit] + budget * _COST_OF_A_PASS + cost[start + 1 : start + fit + 1])[::-1]
        ends[start] = start + fit - int(total.argmin())  # the largest of equally cheap passes
        cost[start] = total.min()
    cuts, at = [], 0
    while at < count:
        at = int(ends[at])
        cuts.append(at)
    return cuts
