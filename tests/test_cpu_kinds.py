"""Whole runs in whatever `auto` chooses, with products as the commands have them: what holds on every kind of CPU.

`scripts/test.sh` runs what is marked `cpu_kinds` again as a CPU without bf16 units and as one with them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from rlhf_accel.system.arithmetic import computes_in_bf16, multiplies_exactly
from rlhf_accel.training.ppo_trainer import PPOTrainer

pytestmark = pytest.mark.cpu_kinds

CPU = torch.device("cpu")
AUTO = {"model": {"dtype": "auto"}, "run": {"precision": "auto", "eval_samples": 4, "sample_every": 1}}


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """In the place of the one of all other tests: `tune_process` decides how fp32 is multiplied, as in a command."""
    before = torch.get_float32_matmul_precision()
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    torch.set_float32_matmul_precision(before)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def rounded_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 products whose factors are rounded to bf16 first, as bf16 units do under the "medium" setting."""

    def rounding(owner: object, name: str, first: int) -> None:
        exact = getattr(owner, name)

        def product(*args: object, **kwargs: object) -> torch.Tensor:
            args = tuple(
                x.bfloat16().float() if i in (first, first + 1) and x.dtype == torch.float32 else x
                for i, x in enumerate(args)
            )
            return exact(*args, **kwargs)

        monkeypatch.setattr(owner, name, product)

    for owner, name, first in (
        *(
            (torch.nn.functional, "linear", 0),
            (torch, "matmul", 0),
            (torch, "addmm", 1),
            (torch.Tensor, "__matmul__", 0),
        ),
    ):
        rounding(owner, name, first)


def fitted(tiny, folder: Path, **sections: dict) -> tuple[PPOTrainer, list[dict]]:
    run = {**AUTO["run"], "output_dir": str(folder)}
    trainer = PPOTrainer(tiny(**{**sections, "run": run, "model": {**AUTO["model"], **sections.get("model", {})}}))
    trainer.fit()
    rows = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(row["optim/skipped_steps"] == 0 and row["optim/grad_norm"] > 0 for row in rows)
    assert rows[0]["objective/kl_k3"] == pytest.approx(0, abs=1e-3)
    return trainer, rows


def assert_ratio_starts_at_one(rows: list[dict], exact: bool) -> None:
    assert rows[0]["policy/first_ratio_error"] < (1e-3 if exact else 0.1)


def test_lora_and_a_classifier_in_what_auto_chooses(tiny, tmp_path, classifier_folder):
    """A frozen base and the reward model in bf16 where that is native; what is trained in fp32; one seed, one run."""
    reward = {"function": [], "model": str(classifier_folder), "label": "POSITIVE", "dtype": "auto"}
    trainer, rows = fitted(tiny, tmp_path / "one", lora={"r": 4}, reward=reward)
    chosen = torch.bfloat16 if computes_in_bf16(CPU) else torch.float32
    parameters = list(trainer.runtime.plain_module.parameters())
    assert {p.dtype for p in parameters if not p.requires_grad} == {chosen}
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    (term,) = (function for _, _, function in trainer.reward.terms)
    assert {p.dtype for p in term.model.parameters()} == {chosen}
    assert_ratio_starts_at_one(rows, exact=chosen == torch.float32 and multiplies_exactly(CPU))
    again, _ = fitted(tiny, tmp_path / "again", lora={"r": 4}, reward=reward)
    one, other = ((run.folder / "samples.jsonl").read_bytes() for run in (trainer, again))
    assert one == other


def test_full_fine_tuning_in_what_auto_chooses(tiny, tmp_path):
    """In fp32 on every CPU, whose products may yet be rounded."""
    trainer, rows = fitted(tiny, tmp_path / "run")
    assert {p.dtype for p in trainer.runtime.plain_module.parameters()} == {torch.float32}
    assert trainer.runtime.precision == "fp32"
    assert_ratio_starts_at_one(rows, exact=multiplies_exactly(CPU))


def test_a_run_whose_products_are_rounded_is_not_refused_as_one_that_computes_something_else(
    tiny, tmp_path, rounded_factors
):
    assert not multiplies_exactly(CPU)
    trainer, rows = fitted(tiny, tmp_path / "run")
    assert trainer.setup.dtype == torch.bfloat16, "the limits of step 1 are those of what the products are"
    assert_ratio_starts_at_one(rows, exact=False)
