"""The package on a pretended CUDA device: what runs, what equals the CPU, how often the host waits (docs/gpu.md)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device import plans
from tests.distributed.launch import ROOT, environment

HERE = Path(__file__).parent


def built_guard(folder: Path) -> Path:
    """guard.cpp as a library; skips the test where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        pytest.skip("needs a C++ compiler (c++, g++, or clang++) for the pretended device")
    of_torch, library = Path(torch.__file__).parent, folder / "guard.so"
    command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{of_torch}/include", str(HERE / "guard.cpp")]
    command += ["-o", str(library), f"-L{of_torch}/lib", f"-Wl,-rpath,{of_torch}/lib", "-Wl,--no-as-needed", "-lc10"]
    done = subprocess.run([*command, "-ltorch_cpu"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return library


@pytest.fixture(scope="module")
def found(
    tmp_path_factory, gpt2_folder: Path, llama_folder: Path, classifier_folder: Path, prompts_file: Path
) -> dict[str, Any]:
    """What one process found on the pretended device."""
    work = tmp_path_factory.mktemp("device")
    folders = {"gpt2": gpt2_folder, "llama": llama_folder, "classifier": classifier_folder, "prompts": prompts_file}
    order = {"folders": {name: str(path) for name, path in folders.items()}, "work": str(work)}
    order["found"] = str(work / "found.json")
    (work / "order.json").write_text(json.dumps(order))
    command = [sys.executable, "-m", "tests.device.runs", str(work / "order.json")]
    settings = environment(PRETENDED_DEVICE=str(built_guard(work)), HF_DEACTIVATE_ASYNC_LOAD="1")
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-8000:]
    print(done.stderr)
    return json.loads(Path(order["found"]).read_text())


# How often the host reads from the device, or copies in a way that may wait, for one of each unit (docs/gpu.md).
WAITS: dict[str, float] = {
    **{"token": 1, "token, min_new_tokens": 0, "token, stop texts": 1, "token, top_k and top_p": 1},
    **{"token, static form": 1, "token, static form with stop texts": 1},
    **{"sampling pass": 1, "forward pass": 0, "micro-batch": 0, "minibatch": 2, "classifier batch": 0, "step": 2},
}


@pytest.mark.parametrize("name", plans.SAME)
def test_an_fp32_run_on_the_device_has_the_figures_of_the_cpu(name: str, found) -> None:
    assert "raised" not in found[name], found[name]
    assert found[name]["figures"] >= 20 * found[name]["steps"]
    assert found[name]["difference"] <= plans.TOLERANCE, found[name]


@pytest.mark.parametrize("name", plans.ROUNDED)
def test_a_run_in_half_precision_passes_the_checks_of_its_first_step(name: str, found) -> None:
    assert "raised" not in found[name], found[name]


def test_reward_training_is_where_it_was_launched(found) -> None:
    assert found["reward training"] == {"gpu": "cuda", "cpu": "cpu"}


@pytest.mark.parametrize("command", ["generate", "evaluate", "merge", "replay"])
def test_a_command_runs_on_the_device(command: str, found) -> None:
    assert found["commands"][command] is None


@pytest.mark.parametrize("unit", WAITS)
def test_the_host_waits_no_more_often_than_is_known(unit: str, found) -> None:
    counted = found["counts"][unit]
    assert waits(counted) == WAITS[unit], "\n".join(counted["where"])


def test_the_weights_of_a_frozen_base_are_cast_once_for_a_rollout(found) -> None:
    assert 0 < found["casts"]["short"] == found["casts"]["long"]


def test_a_read_for_each_token_is_noticed(found) -> None:
    assert waits(found["a planted read"]) == WAITS["token"] + 1, found["a planted read"]


@pytest.mark.parametrize(
    ("bug", "message"),
    [
        ("a factory without a device", "at least two devices, cuda:0 and cpu! (aten::mul, cpu "),
        ("numpy of a tensor", "can't convert cuda:0 device type tensor to numpy"),
        ("a gradient on the CPU", "at least two devices, cuda:0 and cpu! (aten::where, cpu "),
        ("two devices joined", "at least two devices, cuda:0 and cpu! (aten::cat, cpu "),
    ],
)
def test_a_bug_that_a_cpu_does_not_mind_is_caught(bug: str, message: str, found) -> None:
    assert message in found["planted"][bug]


def test_the_page_shows_these_counts() -> None:
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| (\d+) \|", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE)
    assert {unit: float(number) for unit, number in rows} == WAITS


def waits(counted: dict[str, Any]) -> float:
    return sum(number for kind, number in counted["each"].items() if kind in plans.WAITING)
