"""The GPU check, at its tiny size on a CPU: each part runs or says what it needs, and none can stop the others."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests import forks
from tests.distributed.launch import ROOT, environment
from tests.gpu import check, parts
from tests.gpu.bench import Bench, Skipped

# Those that launch processes take a minute: scripts/gpu_check.sh FOLDER --tiny
QUICK = [name for name in check.PARTS if name not in ("zero", "speed", "collectives")]


def test_the_script_runs_each_part_or_says_why_not(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), str(tmp_path / "found"), "--tiny", "--parts", *QUICK]
    settings = environment(PYTHON=str(forks.python(tmp_path)))
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = json.loads((tmp_path / "found" / "gpu_check.json").read_text())
    assert list(found) == ["machine", *QUICK] and found["machine"]["device"] == "CPU"
    skipped = {name for name in QUICK if found[name]["status"] == "skipped"}
    assert {name: found[name]["why"] for name in skipped} == {
        "plan": "needs a GPU",
        "four_bits": "needs a GPU",
        "trl": "needs trl 1.12.0 here; or scripts/benchmark.py W7 W8 --against trl [--wheels FOLDER]",
    }
    assert all(found[name]["figures"] for name in set(QUICK) - skipped)
    assert found["graphs"]["figures"]["same rows"] == 1 and found["graphs"]["figures"]["logprob error"] < 1e-4
    assert found["first_ratios"]["figures"]["rms"] < 1e-4 and found["first_ratios"]["figures"]["tokens"] > 100
    page = (tmp_path / "found" / "gpu_check.md").read_text()
    assert all(f"| {name} | {found[name]['status']} | " in page for name in QUICK)


def test_a_pass_at_another_temperature_is_seen_in_the_first_ratios(tmp_path: Path, monkeypatch) -> None:
    trainer = Bench.trainer

    def warmer(bench: Bench, folder: str, **settings: object) -> object:
        made = trainer(bench, folder, **settings)
        made.runtime.plain_module.temperature = 1.1
        return made

    monkeypatch.setattr(Bench, "trainer", warmer)
    assert parts.first_ratios(Bench(work=tmp_path, tiny=True))["rms"] > 0.05


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path: Path, monkeypatch, capsys) -> None:
    def fails(bench: Bench) -> dict[str, float]:
        assert bench.tiny
        raise ValueError("two\nlines")

    def lacks(bench: Bench) -> dict[str, float]:
        raise Skipped("needs luck")

    monkeypatch.setattr(check, "PARTS", {"fails": fails, "lacks": lacks, "works": lambda bench: {"it": 0.5}})
    assert check.main([str(tmp_path), "--tiny"]) == 1
    rows = [re.sub(r"\| \d\.\d \|", "|", row, count=1) for row in capsys.readouterr().out.splitlines()]
    assert rows == [
        "| fails | failed | ValueError: two lines |",
        "| lacks | skipped | needs luck |",
        "| works | passed | it 0.5 |",
    ]


@pytest.mark.parametrize(("seconds", "status"), [("-1", "skipped"), ("60", "passed")])
def test_no_part_starts_when_the_time_is_over(seconds: str, status: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(check, "PARTS", {"works": lambda bench: {"it": 1}})
    assert check.main([str(tmp_path), "--tiny", "--seconds", seconds]) == 0
    assert json.loads((tmp_path / "gpu_check.json").read_text())["works"]["status"] == status
