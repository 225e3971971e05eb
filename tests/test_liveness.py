"""The phase that each process reports, and the message that names the missing ones."""

from __future__ import annotations

import math
import re
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import Config, RunConfig
from rlhf_accel.distributed import accelerator, liveness
from rlhf_accel.distributed.liveness import Heartbeat, is_lost_contact, who_is_missing
from rlhf_accel.runs import recorder
from rlhf_accel.runs.progress_line import ProgressLine


def test_each_phase_is_logged_and_posted(tmp_path: Path) -> None:
    posted: list[str] = []
    heartbeat = Heartbeat(posted.append)
    heartbeat("calibration")  # before there is a folder
    heartbeat.open(tmp_path / "logs" / "rank-3.log")
    heartbeat("rollout of step 1")
    heartbeat("score of step 1")
    heartbeat.close()
    lines = (tmp_path / "logs" / "rank-3.log").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["rollout of step 1", "score of step 1"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)
    assert [text.partition(" since ")[0] for text in posted] == ["calibration", "rollout of step 1", "score of step 1"]
    assert heartbeat.now == "score of step 1"


def test_a_phase_that_lasts_is_logged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_LONG", 0.05)
    heartbeat = Heartbeat()
    heartbeat.open(tmp_path / "rank-0.log")
    heartbeat("update of step 7")
    deadline = time.monotonic() + 20
    while "still" not in (tmp_path / "rank-0.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heartbeat.close()
    assert " update of step 7: still, for 0 s\n" in (tmp_path / "rank-0.log").read_text()


def test_a_phase_beyond_its_limit_is_reported_once_before_nccl_aborts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert liveness.BEFORE_ABORT > liveness._LONG, "the report would come after the abort"
    asked: list[str] = []
    monkeypatch.setattr(liveness, "_LONG", 0.01)
    monkeypatch.setattr(liveness, "first_of_all", lambda event: asked.append(event) or len(asked) == 1)
    heartbeat = Heartbeat(missing=lambda: {5: "score of step 7 since noon"}, limit=0.05)
    heartbeat.open(tmp_path / "rank-0.log")
    heartbeat("score of step 7")
    deadline = time.monotonic() + 20
    while len(asked) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heartbeat.close()
    said = capsys.readouterr().err
    assert set(asked) == {"late/score of step 7"} and said.count("\n") == 1
    assert re.match(r"warning: score of step 7 has lasted \d+ s, longer than run.collective_timeout; ", said)
    assert "rank 5 (in score of step 7 since noon)" in said


def test_one_process_is_the_first_for_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    assert liveness.first_of_all("error"), "without a process group"
    store = torch.distributed.HashStore()
    monkeypatch.setattr(liveness, "_store", lambda: store)
    assert [liveness.first_of_all(event) for event in ("late/a", "late/a", "late/b", "late/a")] == [
        *(True, False, True, False)
    ]

    def gone() -> None:
        raise torch.distributed.DistNetworkError("the process that serves the store has ended")

    monkeypatch.setattr(liveness, "_store", gone)
    assert liveness.first_of_all("late/a")


@pytest.mark.parametrize(
    ("processes", "device", "limit"), [(2, "cuda", 7.0), (1, "cuda", math.inf), (2, "cpu", math.inf)]
)
def test_late_phases_are_reported_only_where_nccl_would_abort(
    processes: int, device: str, limit: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "fp32_products", lambda device: None)
    config, line = parse(Config, {"run": {"collective_timeout": 7.0}}), ProgressLine(1, enabled=False)
    runtime: Any = SimpleNamespace(world_size=processes, device=torch.device(device))
    assert recorder.Recorder(config, tmp_path, runtime, line, config).heartbeat._limit == limit


def test_all_process_groups_get_the_time_limit_of_the_first() -> None:
    distributed, limit = torch.distributed, timedelta(seconds=77)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=limit)
    try:
        group = distributed.new_group([0], timeout=timedelta(seconds=5))
        liveness.share_time_limit()
        assert group._get_backend(torch.device("cpu")).options._timeout == limit
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("has_gpu", [True, False])
def test_nccl_waits_longer_than_the_report(monkeypatch: pytest.MonkeyPatch, has_gpu: bool) -> None:
    made: dict[str, Any] = {}

    class Made(Exception):
        pass

    def make(**settings: Any) -> None:
        made.update(settings)
        raise Made

    monkeypatch.setattr(accelerator, "has_gpu", lambda: has_gpu)
    monkeypatch.setattr(accelerator, "Accelerator", make)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Made):
        accelerator.make_accelerator(RunConfig(collective_timeout=600.0), None)
    (group,) = made["kwargs_handlers"]
    assert group.timeout.total_seconds() == 600.0 + (liveness.BEFORE_ABORT if has_gpu else 0)


def test_a_log_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    heartbeat = Heartbeat()
    heartbeat.open(tmp_path / "logs" / "rank-0.log")
    heartbeat("rollout of step 1")
    heartbeat.close()
    assert heartbeat.now == "rollout of step 1"


def test_the_message_names_the_missing_ranks() -> None:
    heartbeat = Heartbeat()
    heartbeat("update of step 2")
    message = who_is_missing(0, heartbeat, {0: "update of step 2 since noon", 5: "score of step 2 since noon"})
    assert message.startswith("rank 0 ") and " in update of step 2; " in message
    assert message.endswith("missing: rank 5 (in score of step 2 since noon)")
    assert "missing: unknown" in who_is_missing(0, heartbeat, {})


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:24452"), True),
        (RuntimeError("NCCL communicator was aborted on rank 1"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("timed out"), False),
    ],
)
def test_errors_of_collectives_are_recognized(error: Exception, lost: bool) -> None:
    assert is_lost_contact(error) == lost
