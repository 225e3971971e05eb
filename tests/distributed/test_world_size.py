"""The same run as one process and as several: under data parallelism and every stage of ZeRO it learns the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.distributed.conftest import BUDGETS, LAUNCHES, PHASES, RESUMED, ROUNDED, RUNS, SAVED, tree
from tests.distributed.launch import rows

pytestmark = pytest.mark.usefixtures("exact_fp32")

MANY = [pytest.param(*key, id=f"{key[0]}-{key[1]}") for key in LAUNCHES if key[0] is not None]


# Another way to the same run.
SAME_AS = {
    **{"in_step": "full", "plain": "full", "lora_portable": "lora"},
    "shared_base_in_step": "shared_base",
}


def assert_same_run(one: Path, other: Path) -> None:
    """The same responses, and the same metrics within 1e-4 relative, time and memory apart."""
    samples, others = rows(one / "samples.jsonl"), rows(other / "samples.jsonl")
    assert len({len(row["response"]) for row in samples}) > 3, "responses of one length would test little"
    assert [(row["step"], row["prompt"], row["response"]) for row in samples] == [
        (row["step"], row["prompt"], row["response"]) for row in others
    ]
    metrics, other_metrics = rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl")
    assert len(metrics) == len(other_metrics) > 0
    for row, other_row in zip(metrics, other_metrics, strict=True):
        assert row.keys() == other_row.keys()
        for key in row.keys() - {key for key in row if key.startswith(("time/", "perf/"))}:
            # Sums that cancel out, such as the policy's loss at ratio 1, keep the rounding of their terms.
            same = row[key] == other_row[key] if row[key] is None else None
            assert same or row[key] == pytest.approx(other_row[key], rel=1e-4, abs=2e-6), f"{key} of {row['step']}"


def assert_same_weights(one: Path, other: Path, atol: float = 1e-5) -> None:
    """Every file of weights: the policy or its adapter, the critic's adapter, the value head."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors"))
    for file in files:
        weights, others = load_file(one / file), load_file(other / file)
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(others[name], weight, rtol=0, atol=atol, msg=f"{file}: {name}")


@pytest.mark.parametrize(("config", "processes"), MANY)
def test_a_run_is_the_same_on_any_number_of_processes(config: str, processes: int, launched_runs) -> None:
    alone, folder = launched_runs(None, 1), launched_runs(config, processes)
    for name in LAUNCHES[config, processes]:
        base = SAME_AS.get(name, name)
        if base in LAUNCHES[None, 1] and name not in (*ROUNDED, "gradient"):
            assert_same_run(alone / base, folder / name)
            for which in ("final", "best"):
                assert_same_weights(alone / base / which, folder / name / which)


def test_the_runs_learn_something(launched_runs) -> None:
    """Otherwise all of them would agree."""
    for name in ("full", "lora"):
        metrics = rows(launched_runs(None, 1) / name / "metrics.jsonl")
        assert metrics[0]["objective/kl_k3"] == pytest.approx(0, abs=1e-6) and metrics[-1]["objective/kl_k3"] > 1e-3


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_bf16_runs_stay_close(config: str, launched_runs) -> None:
    """A bf16 base under fp32 adapters, and bf16 arithmetic over fp32 weights, which fp32 gradients move."""
    alone, folder = launched_runs(None, 1), launched_runs(config, 2)
    for name in (name for name in LAUNCHES[config, 2] if name in ROUNDED):
        base = rows(alone / name.removesuffix("_in_step") / "metrics.jsonl")
        metrics = rows(folder / name / "metrics.jsonl")
        assert len(metrics) == (1 if name.endswith("in_step") else 2)
        # Rounded gradients, summed in another order, move the policy elsewhere: later samples part, as rounding must.
        one, other = (
            [(row["prompt"], row["response"]) for row in rows(path / "samples.jsonl") if row["step"] == 1]
            for path in (alone / name.removesuffix("_in_step"), folder / name)
        )
        assert one == other and len(one) == 8, f"{name}: step 1 samples what one process does"
        for key in ("objective/entropy", "loss/value", "optim/grad_norm"):
            assert metrics[0][key] == pytest.approx(base[0][key], rel=0.05), f"{name}: {key}"
        assert all(row["optim/skipped_steps"] == 0 and row["optim/grad_norm"] > 0 for row in metrics)
        for weight in load_file(next((folder / name / "final").glob("*model.safetensors"))).values():
            assert weight.dtype == torch.float32 and (weight != weight.bfloat16().float()).any()


def test_stopping_early_stops(launched_runs) -> None:
    """Otherwise the runs that agree on it would show nothing."""
    metrics, full = (rows(launched_runs(None, 1) / name / "metrics.jsonl") for name in ("stopped", "full"))
    assert metrics[0]["policy/approx_kl"] != pytest.approx(full[0]["policy/approx_kl"], rel=0.01)


@pytest.mark.parametrize(("config", "processes"), [(None, 1), ("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_what_is_not_finite_on_one_rank_is_skipped_on_all(config: str | None, processes: int, launched_runs) -> None:
    """A score or a log-probability costs the whole step, counted once; a gradient the step of its minibatch."""
    metrics = rows(launched_runs(config, processes) / "poisoned" / "metrics.jsonl")
    assert [row["optim/skipped_steps"] for row in metrics] == [1, 2, 3, 3]
    assert [row["loss/total"] is None for row in metrics] == [True, True, False, False]
    assert metrics[2]["objective/kl_k3"] < 1e-9 < metrics[3]["objective/kl_k3"], "steps 1 and 2 changed nothing"
    assert all(row["optim/grad_norm"] > 0 for row in metrics[2:])


SAVES = [(*launch, name) for launch, names in RESUMED.items() for name in names]


def assert_same_row(row: dict[str, Any], other: dict[str, Any], rel: float, floor: float) -> None:
    assert row.keys() == other.keys()
    for key in row.keys() - {key for key in row if key.startswith(("time/", "perf/"))}:
        assert row[key] == pytest.approx(other[key], rel=rel, abs=floor), key


@pytest.mark.parametrize(("config", "processes", "name"), SAVES)
def test_a_run_goes_on_from_a_checkpoint(config: str | None, processes: int, name: str, launched_runs) -> None:
    """Within 1e-6 of the run that was not stopped; one process to the last bit."""
    folder = launched_runs(config, processes)
    saved, resumed = (rows(folder / which / "metrics.jsonl") for which in (name, f"{name}_resumed"))
    assert [row["step"] for row in resumed] == [2]
    exact = config is None
    assert_same_row(resumed[0], saved[1], rel=0 if exact else 1e-6, floor=0 if exact else 1e-7)
    assert_same_weights(folder / name / "final", folder / f"{name}_resumed" / "final", 0 if exact else 1e-6)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("ddp", "full"),
        ("zero2", "full"),
        ("zero3", "full"),
        ("zero3", "lora_portable"),
        ("zero3_offload", "full"),
    ],
)
def test_one_process_goes_on_from_a_checkpoint_of_two(
    config: str, name: str, launched_runs, gpt2_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    place, alone = launched_runs(config, 2) / name, launched_runs(None, 1) / SAME_AS.get(name, name)
    run = {"output_dir": str(tmp_path / "on"), "resume": str(place / "checkpoints" / "step-000001")}
    PPOTrainer(parse(Config, tree(gpt2_folder, prompts_file, RUNS[name], {"run": {**RUNS[name]["run"], **run}}))).fit()
    resumed, saved = rows(tmp_path / "on" / "metrics.jsonl"), rows(alone / "metrics.jsonl")
    assert [row["step"] for row in resumed] == [2]
    assert_same_row(resumed[0], saved[1], rel=1e-4, floor=2e-6)
    assert_same_weights(alone / "final", tmp_path / "on" / "final")


@pytest.mark.parametrize(("config", "name"), [("ddp", "from_one"), ("zero2", "from_one_lora"), ("zero3", "from_one")])
def test_two_processes_go_on_from_a_checkpoint_of_one(config: str, name: str, launched_runs) -> None:
    alone = launched_runs(None, 1) / ("lora" if name.endswith("lora") else "full")
    resumed, saved = (rows(folder / "metrics.jsonl") for folder in (launched_runs(config, 2) / name, alone))
    assert [row["step"] for row in resumed] == [2]
    assert_same_row(resumed[0], saved[1], rel=1e-4, floor=2e-6)
    assert_same_weights(alone / "final", launched_runs(config, 2) / name / "final")


@pytest.mark.parametrize(("config", "phase"), [*(("ddp", phase) for phase in PHASES), ("zero3", "update")])
def test_a_signal_to_one_rank_stops_all_and_nothing_is_lost(config: str, phase: str, launched_runs) -> None:
    """The worker saw to it that every rank left with 143."""
    alone, stopped = launched_runs(None, 1) / "longer", launched_runs(config, 2) / f"stopped_in_{phase}"
    assert_same_run(alone, stopped)
    assert_same_weights(alone / "final", stopped / "final")


def test_a_rank_without_room_costs_a_checkpoint_and_not_the_run(launched_runs) -> None:
    folder = launched_runs("zero2", 2) / "no_room"
    places = sorted(path.name for path in (folder / "checkpoints").glob("*"))
    assert places == ["latest", "step-000002"]
    assert_same_run(launched_runs(None, 1) / "full", folder)


def test_another_launch_is_refused_before_anything_loads(launched_runs, gpt2_folder: Path, prompts_file: Path) -> None:
    place = launched_runs("zero3", 2) / "lora" / "checkpoints" / "step-000002"
    with pytest.raises(
        ConfigError,
        match=r"^run\.resume=.*ZeRO-3 on 2 processes, and this is no DeepSpeed; only run\.checkpoint=portable",
    ):
        PPOTrainer(parse(Config, tree(gpt2_folder, prompts_file, {"run": {**SAVED, "resume": str(place)}})))


def test_what_zero3_writes_is_a_whole_model_that_trains_on(
    launched_runs, gpt2_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    final = launched_runs("zero3", 2) / "full" / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    base = AutoModelForCausalLM.from_pretrained(gpt2_folder)
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), base.parameters(), strict=True))
    assert model.generate(**tokenizer("A dull", return_tensors="pt"), max_new_tokens=4).shape[1] > 4
    change = {"run": {"output_dir": str(tmp_path / "on"), "total_steps": 1}}
    trainer = PPOTrainer(parse(Config, tree(final, prompts_file, change)))
    trainer.fit()
    metrics = rows(tmp_path / "on" / "metrics.jsonl")
    assert metrics[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and metrics[0]["optim/grad_norm"] > 0


def test_what_zero3_writes_has_the_buffers_of_the_model(launched_runs) -> None:
    model = AutoModelForCausalLM.from_pretrained(launched_runs("zero3", 2) / "buffers" / "final")
    assert [float(layer.layer_scalar) for layer in model.model.layers] == [0.5, 0.5], "initially 1"


def gradients(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"{budget}.pt", weights_only=True) for budget in BUDGETS]


def assert_same_gradient(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    assert largest > 0.5
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=0, atol=1e-6 * largest, msg=name)


def test_micro_batches_do_not_change_the_gradient(launched_runs) -> None:
    first, *others = gradients(launched_runs(None, 1))
    for other in others:
        assert_same_gradient(first, other)


@pytest.mark.parametrize("config", ["ddp", "zero2", "zero3"])
def test_ranks_do_not_change_the_gradient(config: str, launched_runs) -> None:
    expected = gradients(launched_runs(None, 1))[0]
    for gradient in gradients(launched_runs(config, 2)):
        assert_same_gradient(expected, gradient)
