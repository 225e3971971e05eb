"""Micro-batches: a matter of memory and of ranks, not of what is learned. And what a launch's DeepSpeed file may say.

What several processes do together is in tests/distributed/.
"""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from hypothesis import given
from hypothesis import strategies as st

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config, RunConfig
from rlhf_accel.distributed import runtime as distributed
from rlhf_accel.distributed.runtime import Runtime, _deepspeed_plugin, cut_by_tokens, cut_micro_batches
from rlhf_accel.system.errors import ConfigError, RunFailed

LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=20)


@given(LENGTHS, st.integers(18, 100), st.integers(1, 4))
def test_every_row_once_and_every_rank_as_often(lengths: list[tuple[int, int]], budget: int, ranks: int) -> None:
    queries, responses = torch.tensor(lengths).T
    rows = torch.arange(len(lengths)).flip(0)[::2]  # a minibatch: some rows, in an order of its own
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


def test_ranks_carry_like_loads() -> None:
    responses = torch.tensor([9, 1, 8, 2, 7, 3, 6, 4])
    one, other = cut_micro_batches(torch.ones(8, dtype=torch.int64), responses, torch.arange(8), 1000, 2)
    assert abs(int(responses[one[0]].sum()) - int(responses[other[0]].sum())) <= 4


# DeepSpeed's file


@pytest.fixture
def deepspeed_file(tmp_path, monkeypatch):
    """A function that writes a file and gives what a launch of two processes with it makes of it."""

    def filled(changes, *, precision="fp32", max_grad_norm=1.0, minibatch=7):
        tree = {"zero_optimization": {"stage": 2}, **changes}
        (tmp_path / "ds.json").write_text(json.dumps(tree))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
        monkeypatch.setenv("WORLD_SIZE", "2")
        return _deepspeed_plugin(precision, max_grad_norm, minibatch).deepspeed_config

    return filled


AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)


@pytest.mark.parametrize("said", [AUTO, {}], ids=["auto", "absent"])
def test_deepspeed_sizes_come_from_the_run(deepspeed_file, said):
    config = deepspeed_file(said)
    # Seven samples on two ranks are four at most; DeepSpeed wants the product.
    sizes = [config[key] for key in AUTO]
    assert sizes == [8, 4, 1, 1.0]
    assert not config["torch_autocast"]["enabled"]
    assert deepspeed_file(said, max_grad_norm=None)["gradient_clipping"] == 0.0
    autocast = {"dtype": "bfloat16", "enabled": True, "lower_precision_safe_modules": []}
    assert deepspeed_file(said, precision="bf16")["torch_autocast"] == autocast


def test_a_deepspeed_file_that_agrees_is_taken(deepspeed_file):
    config = deepspeed_file({"train_batch_size": 7, "gradient_clipping": 1.0, "bf16": {"enabled": False}})
    assert (config["train_batch_size"], config["gradient_clipping"]) == (8, 1.0)


def test_sizes_of_buckets_that_are_auto_are_deepspeeds_own(deepspeed_file):
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": 1000}
    config = deepspeed_file({"zero_optimization": zero})["zero_optimization"]
    assert "reduce_bucket_size" not in config and config["stage3_prefetch_bucket_size"] == 1000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_batch_size": 8}, ["train_batch_size=8", "rollout.batch_size / ppo.num_minibatches = 7"]),
        ({"train_micro_batch_size_per_gpu": 2}, ["train_micro_batch_size_per_gpu=2", "over 2 processes"]),
        ({"gradient_accumulation_steps": 4}, ["gradient_accumulation_steps=4", "ppo.micro_batch_tokens"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "optim.max_grad_norm=1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=True", "run.precision=fp32"]),
        ({"fp16": {"enabled": True}}, ["fp16.enabled=True", "run.precision"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.enabled=True", "run.precision=fp32"]),
        ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage", "ddp.yaml"]),
        ({"optimizer": {"type": "AdamW"}}, ["optimizer in ", "optim.*"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler in ", "optim.*"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_deepspeed_file_that_disagrees_is_refused(deepspeed_file, changes, words):
    with pytest.raises(ConfigError) as caught:
        deepspeed_file(changes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "ds.json" in str(caught.value)


def test_a_deepspeed_file_that_is_none_is_refused(deepspeed_file, tmp_path, monkeypatch):
    deepspeed_file({})
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match=r"^deepspeed_config_file: .*ds\.json is no JSON"):
        _deepspeed_plugin("fp32", 1.0, 8)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "other.json"))
    with pytest.raises(ConfigError, match=r"^deepspeed_config_file: .*other\.json cannot be read"):
        _deepspeed_plugin("fp32", 1.0, 8)


def test_no_launch_by_deepspeed_is_none():
    assert _deepspeed_plugin("fp32", 1.0, 8) is None
    assert Runtime(parse(Config, {}).run).zero_stage == 0


def test_an_accelerator_of_another_precision_is_named_and_not_the_trackers() -> None:
    Accelerator(mixed_precision="bf16", cpu=True)
    with pytest.raises(ConfigError, match=r"already has an Accelerator\(mixed_precision='bf16'\)") as found:
        Runtime(parse(Config, {}).run)
    assert found.value.facts == {"mixed_precision": "bf16"} and "run.trackers" not in str(found.value)


def test_a_gradient_is_applied_whatever_another_accelerator_left() -> None:
    """Accelerate skips optimizer steps while gradients accumulate, by one flag of the whole process."""
    runtime = Runtime(parse(Config, {}).run)
    module = torch.nn.Linear(2, 1)
    runtime.prepare(module, torch.optim.SGD(module.parameters(), lr=1.0))
    before = module.weight.clone()
    runtime.backward([lambda: module(torch.ones(2)).sum()])
    GradientState()._set_sync_gradients(False)
    assert runtime.optimizer_step()[1]
    torch.testing.assert_close(module.weight, before - 1)
    assert module.weight.grad is None


def test_passes_of_very_different_lengths_pad_little() -> None:
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
    assert len(passes) <= 6, "few rows at a time pad nothing, and cost a pass each"


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


@pytest.mark.parametrize("error", [ConfigError("no.key: is wrong"), OSError("stale file handle")])
def test_what_the_main_process_raises_reaches_the_others(monkeypatch, error) -> None:
    """Else they would wait for its result until run.collective_timeout."""
    sent = []
    runtime = Runtime(RunConfig(trackers=()))
    monkeypatch.setattr(Runtime, "world_size", property(lambda self: 2))
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda outcome: sent.append(outcome[0]))

    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        runtime.from_main(fail)
    monkeypatch.setattr(Runtime, "is_main", property(lambda self: False))
    monkeypatch.setattr(distributed, "broadcast_object_list", lambda outcome: outcome.__setitem__(0, sent[0]))
    with pytest.raises((ConfigError, RunFailed), match=str(error)):
        runtime.from_main(fail)
