"""Batches check their shapes and dtypes, and give new batches of the same rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from rlhf_accel.algorithm.batches import Experience, PromptBatch, Responses, Rollout, Sequences


def make_sequences(queries: list[list[int]], responses: list[list[int]], width: int = 4, length: int = 3) -> Sequences:
    """0 is padding."""
    left = torch.tensor([[0] * (width - len(row)) + row for row in queries]).reshape(len(queries), width)
    right = torch.tensor([row + [0] * (length - len(row)) for row in responses]).reshape(len(responses), length)
    return Sequences(queries=left.long(), query_mask=left != 0, responses=right.long(), response_mask=right != 0)


def make_prompts() -> PromptBatch:
    queries = torch.tensor([[0, 1], [2, 3], [0, 4]])
    return PromptBatch(
        queries=queries,
        query_mask=queries != 0,
        index=torch.arange(3),
        sample=torch.arange(3),
        texts=("a", "b", "c"),
        columns={"texts": ("x", "y", "z"), "number": (1, 2, 3)},
    )


def make_responses() -> Responses:
    return Responses(
        sequences=make_sequences([[1], [2, 3], [4]], [[5], [6, 7], [8]]),
        finished=torch.tensor([True, False, True]),
        logprobs=-torch.rand(3, 3),
        entropy=torch.rand(3, 3),
        values=torch.rand(3, 3),
        prompts=("a", "b", "c"),
        texts=("d", "e", "f"),
        columns={"number": (1, 2, 3)},
    )


def make_rollout() -> Rollout:
    rows = {name: torch.rand(3, 3) for name in ("partial_scores", "logprobs", "ref_logprobs", "values", "entropy")}
    return Rollout(
        sequences=make_responses().sequences,
        groups=torch.arange(3),
        finished=torch.tensor([True, False, True]),
        scores=torch.tensor([0.0, 1.0, 2.0]),
        prompts=("a", "b", "c"),
        texts=("d", "e", "f"),
        **rows,
    )


def make_experience() -> Experience:
    names = ("old_logprobs", "ref_logprobs", "old_values", "rewards", "advantages", "returns")
    return Experience(sequences=make_responses().sequences, **{name: torch.rand(3, 3) for name in names})


MAKERS = [make_prompts, make_responses, make_rollout, make_experience]


@pytest.mark.parametrize("make", MAKERS)
def test_every_tensor_is_checked(make: Any) -> None:
    batch = make()
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            with pytest.raises(ValueError, match=field.name if "mask" not in field.name else "quer"):
                dataclasses.replace(batch, **{field.name: value[:2]})
            with pytest.raises(ValueError, match=field.name):
                dataclasses.replace(batch, **{field.name: value.to(torch.float64)})
        elif isinstance(value, tuple):
            with pytest.raises(ValueError, match=f"{field.name} has 2 rows, expected 3"):
                dataclasses.replace(batch, **{field.name: value[:2]})
        elif isinstance(value, dict):
            two = torch.ones(2) if field.name == "term_scores" else (1, 2)
            with pytest.raises(
                ValueError, match=r"number (has 2 rows, expected 3|is torch.float32 \(2,\), expected .*\(3,\))"
            ):
                dataclasses.replace(batch, **{field.name: {"number": two}})


@pytest.mark.parametrize("name", ["queries", "query_mask", "responses", "response_mask"])
def test_every_tensor_of_sequences_is_checked(name: str) -> None:
    rows = make_sequences([[1], [2]], [[3], [4]])
    value = getattr(rows, name)
    for wrong in (value[:1], value[:, :1], value.to(torch.int32)):
        with pytest.raises(ValueError, match="expected"):
            dataclasses.replace(rows, **{name: wrong})


def test_sequences_and_their_figures_must_have_the_same_rows() -> None:
    with pytest.raises(ValueError, match="finished"):
        dataclasses.replace(make_responses(), sequences=make_sequences([[1]], [[2]]))


@pytest.mark.parametrize("make", MAKERS)
def test_a_batch_cannot_be_changed(make: Any) -> None:
    batch = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(batch, dataclasses.fields(batch)[0].name, None)


@pytest.mark.parametrize("make", MAKERS)
def test_select_gives_these_rows_in_this_order(make: Any) -> None:
    batch, rows = make(), torch.tensor([2, 0, 2])
    chosen = batch.select(rows)
    assert type(chosen) is type(batch) and chosen is not batch and len(chosen) == 3
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(chosen, field.name)
        if isinstance(before, torch.Tensor):
            assert torch.equal(after, torch.stack([before[2], before[0], before[2]]))
        elif isinstance(before, tuple):
            assert after == (before[2], before[0], before[2])
        elif isinstance(before, dict):
            assert after == {key: (column[2], column[0], column[2]) for key, column in before.items()}
        elif before is None:
            assert after is None
        else:
            assert torch.equal(after.queries, before.queries[rows])
            assert torch.equal(after.response_mask, before.response_mask[rows])


@pytest.mark.parametrize("make", MAKERS)
def test_select_of_no_rows(make: Any) -> None:
    assert len(make().select(torch.zeros(0, dtype=torch.int64))) == 0


@pytest.mark.parametrize("make", MAKERS)
def test_select_leaves_the_batch_as_it_was(make: Any) -> None:
    batch = make()
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    copies = {name: value.clone() for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    for value in vars(batch.select(torch.tensor([0, 1]))).values():
        if isinstance(value, torch.Tensor):
            value.zero_()
    for name, copy in copies.items():
        assert torch.equal(tensors[name], copy)


@pytest.mark.parametrize("make", MAKERS)
def test_to_moves_nested_tensors_too(make: Any) -> None:
    # No second device in these tests: `meta` is one that holds no numbers.
    batch = make()
    moved = batch.to("meta")
    assert moved is not batch
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert before.device.type == "cpu" and after.device.type == "meta"
        elif isinstance(before, Sequences):
            assert before.queries.device.type == "cpu" and after.response_mask.device.type == "meta"
        else:
            assert after == before


def test_lengths_count_query_and_response() -> None:
    rows = make_sequences([[1], [2, 3, 4, 5]], [[6, 7, 8], []])
    assert rows.lengths.tolist() == [1 + 3, 4 + 0]


def test_trimmed_keeps_the_widest_row() -> None:
    rows = make_sequences([[1], [2, 3]], [[4], []])
    trimmed = rows.trimmed()
    assert trimmed.queries.tolist() == [[0, 1], [2, 3]]
    assert trimmed.query_mask.tolist() == [[False, True], [True, True]]
    assert trimmed.responses.tolist() == [[4], [0]]
    assert trimmed.response_mask.tolist() == [[True], [False]]
    assert trimmed.lengths.tolist() == rows.lengths.tolist()
    assert rows.queries.shape == (2, 4)


def test_trimmed_of_full_rows_is_the_same() -> None:
    rows = make_sequences([[1, 2, 3, 4]], [[5, 6, 7]])
    assert rows.trimmed().queries.tolist() == rows.queries.tolist()
    assert rows.trimmed().responses.tolist() == rows.responses.tolist()


def test_trimmed_of_padding_alone_keeps_a_column() -> None:
    trimmed = make_sequences([[], []], [[], []]).trimmed()
    assert trimmed.queries.shape == trimmed.responses.shape == (2, 1)
    assert not trimmed.query_mask.any() and not trimmed.response_mask.any()


def test_trimmed_of_no_rows() -> None:
    trimmed = make_sequences([[1]], [[2]]).select(torch.zeros(0, dtype=torch.int64)).trimmed()
    assert trimmed.queries.shape == trimmed.responses.shape == (0, 1)


def test_trimmed_goes_by_the_mask_and_not_by_the_ids() -> None:
    rows = dataclasses.replace(make_sequences([[1], [2]], [[3], [4]]), responses=torch.full((2, 3), 9))
    assert rows.trimmed().responses.tolist() == [[9], [9]]


def test_experience_is_trimmed_as_its_sequences_are() -> None:
    whole = make_experience()
    few = whole.select(torch.tensor([0, 2]))
    trimmed, length = few.trimmed(), few.sequences.trimmed().responses.shape[1]
    assert trimmed.sequences.responses.tolist() == few.sequences.trimmed().responses.tolist()
    assert trimmed.advantages.tolist() == few.advantages[:, :length].tolist()
    assert dataclasses.replace(few, old_values=None, returns=None).trimmed().returns is None
