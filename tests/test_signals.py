"""Where each process says it is, and who is said to be missing. Stop signals are in test_nonfinite.py."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest

from rlhf_accel.system import signals as vigil
from rlhf_accel.system.signals import Heartbeat, StopRequest, is_lost_contact, who_is_missing


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
    monkeypatch.setattr(vigil, "_STILL", 0.05)
    heartbeat = Heartbeat()
    heartbeat.open(tmp_path / "rank-0.log")
    heartbeat("update of step 7")
    deadline = time.monotonic() + 20
    while "still" not in (tmp_path / "rank-0.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    heartbeat.close()
    assert " update of step 7: still, for 0 s\n" in (tmp_path / "rank-0.log").read_text()


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    heartbeat = Heartbeat()
    heartbeat.open(tmp_path / "logs" / "rank-0.log")
    heartbeat("rollout of step 1")
    heartbeat.close()
    assert heartbeat.now == "rollout of step 1"


def test_who_is_missing() -> None:
    heartbeat = Heartbeat()
    heartbeat("update of step 2")
    said = who_is_missing(0, heartbeat, {0: "update of step 2 since noon", 5: "score of step 2 since noon"})
    assert said == "rank 0 lost contact after 0 s in update of step 2; missing: rank 5 (in score of step 2 since noon)"
    assert who_is_missing(0, heartbeat, {}).endswith("missing: unknown, logs/rank-*.log say where each was")


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
def test_what_losing_contact_looks_like(error: Exception, lost: bool) -> None:
    assert is_lost_contact(error) == lost


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    def enter() -> None:
        with StopRequest() as request:
            seen.append(request.received)

    seen: list[str | None] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None]
