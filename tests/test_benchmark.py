"""The benchmark: it counts what it says it counts, and its command does what the README says."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlhf_accel.algorithm.logprobs import token_logprobs
from rlhf_accel.models.calls import response_logits
from rlhf_accel.system.errors import ConfigError
from tests import forks

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # its dataclasses look there for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_formula_counts_what_torch_counts(benchmark, kind, tmp_path) -> None:
    workload = benchmark.Workload(
        about="", batch=4, prompt=8, response=24, micro=4, epochs=1, shape=(kind, 2, 128, 600)
    )  # fmt: skip
    path = benchmark.build_model(workload, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    queries, responses = torch.randint(3, 600, (4, 8)), torch.randint(3, 600, (4, 24))
    inputs = (queries, torch.ones_like(queries).bool(), responses, torch.ones_like(responses).bool())
    with FlopCounterMode(display=False) as counter:
        logits, _ = response_logits(model, *inputs)
        token_logprobs(logits, responses).sum().backward()
    counted = counter.get_total_flops()
    assert benchmark.update_flops(workload, path, 4 * 24) == pytest.approx(counted, rel=0.03)
    frozen = benchmark.update_flops(replace(workload, lora_r=8), path, 4 * 24)
    assert frozen < 0.7 * counted


def test_prompts_and_models_are_those_of_the_workload(benchmark, tmp_path) -> None:
    workload = replace(benchmark.WORKLOADS["W6"], batch=3)
    path = benchmark.build_model(workload, tmp_path)
    prompts = benchmark.build_prompts(workload, path)
    assert len(prompts) == 24 and {len(row) for row in prompts} == {workload.prompt}
    model = AutoModelForCausalLM.from_pretrained(path)
    assert (model.config.n_layer, model.config.n_embd, model.config.vocab_size) == (2, 64, 1000)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["W99"], "W99.*W1"),
        (["W6", "--steps", "0"], "--steps 0"),
        (["W6", "--ppo.epoch", "2"], "ppo.epoch"),
        (["W6", "W5", "--against", "trl"], "^W5: .*trl"),
        (["W6", "--output", "no_such_folder/figures.json"], "--output no_such_folder/figures.json: there is no folder"),
        (
            ["W6", "--against", "trl", "--peer-python", "no_such_python"],
            "--peer-python no_such_python is not a program",
        ),
    ],
)
def test_what_cannot_work_is_said_in_a_line(benchmark, arguments, said) -> None:
    with pytest.raises(ConfigError, match=said):
        benchmark.main(arguments)


def test_the_command_measures_a_workload(benchmark, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("RLHF_ACCEL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark.subprocess, "Popen", forks.Forked)
    monkeypatch.setattr(benchmark, "tune_process", lambda: None)  # for the other tests of this process
    file, traces = tmp_path / "figures.json", tmp_path / "traces"
    benchmark.main(
        ["W6", "--steps", "1", "--output", str(file), "--profile", str(traces), "--ppo.ppo_epochs", "1"]
    )  # fmt: skip
    result = json.loads(file.read_text())["W6"]
    mine = result["ours"]
    assert 0 < mine["sampling"] < mine["total"] and 0 < mine["update"] < mine["total"]
    assert mine["tokens"] == 64 * 32
    assert mine["samples_per_second"] == pytest.approx(64 / mine["total"])
    assert result["overrides"] == ["--ppo.ppo_epochs", "1"]
    assert (traces / "W6.json").stat().st_size > 10_000 and "aten::mm" in (traces / "W6.txt").read_text()
    assert "W6: GPT-2 2 x 64" in capsys.readouterr().out
