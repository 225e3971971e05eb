"""One process at a time holds a folder: others get its name, and a dead one loses the lock."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from rlhf_accel.system import lock
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training.ppo_trainer import PPOTrainer

HOLD = """
import sys, time
from pathlib import Path
from rlhf_accel.system import lock
if sys.argv[2] == "none":
    lock._system_lock = lambda handle: None
held = lock.hold(Path(sys.argv[1]), "it", "run.output_dir")
print("held", flush=True)
time.sleep(600)
"""


class Clock:
    """A clock that advances in `sleep`, and then calls `meanwhile` with the time."""

    def __init__(self):
        self.now, self.meanwhile = 0.0, lambda now: None
        self.strftime, self.gmtime = time.strftime, time.gmtime

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.meanwhile(self.now)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(lock, "time", clock)
    return clock


def take(path, messages=None):
    return lock.hold(path, "run.output_dir=x", "run.output_dir", [].append if messages is None else messages.append)


def elsewhere(path, **changes):
    """Write the file as a process of another machine would."""
    holder = replace(lock._this_process(), host="node7", machine="another", **changes)
    path.touch()
    handle = os.open(path, os.O_RDWR)
    lock._write(handle, holder)
    os.close(handle)
    return holder


@pytest.mark.parametrize("system", ["posix", "none"])
def test_a_second_process_gets_the_holder_and_a_killed_holder_loses_the_lock(tmp_path, monkeypatch, clock, system):
    if system == "none":  # as on a network disk without locks
        monkeypatch.setattr(lock, "_system_lock", lambda handle: None)
    path = tmp_path / ".lock"
    other = subprocess.Popen([sys.executable, "-c", HOLD, path, system], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        before, messages = json.loads(path.read_text()), []
        with pytest.raises(ConfigError) as refused:
            take(path, messages)
        assert f"run.output_dir=x is in use by another run (process {other.pid} on {before['host']}, since" in str(
            refused.value
        )
        assert (refused.value.key, refused.value.facts["pid"]) == ("run.output_dir", other.pid)
        assert len(messages) == 1
        assert 10 <= clock.now < 11
        assert json.loads(path.read_text())["token"] == before["token"]
    finally:
        other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # its threads have ended, and it remains a zombie
    late = clock.now
    held = take(path)
    assert clock.now == late
    assert json.loads(path.read_text())["pid"] == os.getpid()
    other.wait()
    held.release()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_on_another_machine_is_alive_while_its_heart_beats(tmp_path, clock):
    path = tmp_path / ".lock"

    def beats_until(end):
        elsewhere(path, token="theirs", beat=0)
        start = clock.now
        clock.meanwhile = lambda now: now <= start + end and elsewhere(path, token="theirs", beat=int(now // lock.BEAT))
        return start

    start = beats_until(1000)
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on node7, since"):
        take(path)
    assert 90 <= clock.now - start < 91
    start = beats_until(40)  # Slurm kills the old job while the new one waits
    held = take(path)
    assert 65 <= clock.now - start < 71
    assert held.lost_to() is None
    held.release()


def test_a_holder_that_was_presumed_dead_notices_and_leaves_the_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    path = tmp_path / ".lock"
    held = take(path)
    assert held.lost_to() is None
    elsewhere(path, token="theirs")
    assert held.lost_to().startswith(f"process {os.getpid()} on node7, since")
    time.sleep(0.2)  # several heartbeats
    held.release()
    assert json.loads(path.read_text())["token"] == "theirs"


def test_a_lock_passes_on_within_a_process_and_ends_with_its_owner(tmp_path):
    path = tmp_path / ".lock"
    first = take(path)
    (tmp_path / "link").symlink_to(tmp_path)
    second = take(tmp_path / "link" / ".lock")
    (tmp_path / "link").unlink()
    assert (first.lost_to(), second.lost_to()) == ("a newer run of this process", None)
    first.release()
    assert path.exists()
    child = os.fork()
    if child == 0:  # which also runs the finalizers at its end
        second.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert path.exists()
    del second
    assert not path.exists()
    third = take(path)
    third.release()
    assert third.lost_to() is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe", b"[" * 1024])
def test_a_file_without_a_holder_is_free(tmp_path, content):
    path = tmp_path / ".lock"
    path.write_bytes(content)
    take(path).release()
    assert not path.exists()


@pytest.mark.usefixtures("exact_fp32")
def test_a_run_whose_folder_was_taken_over_ends_and_writes_nothing_more(tiny, tmp_path, monkeypatch):
    trainer = PPOTrainer(tiny(run={"total_steps": 3, "save_every": 1, "eval_samples": 0}))
    step = trainer.step

    def loses_the_folder(prompts):
        metrics = step(prompts)
        if metrics["step"] == 2:
            elsewhere(trainer.folder / ".lock", token="theirs")
        return metrics

    monkeypatch.setattr(trainer, "step", loses_the_folder)
    with pytest.raises(RunFailed, match=r"was taken over by process \d+ on node7, since .*writes nothing more"):
        trainer.fit()
    assert [path.name for path in (trainer.folder / "checkpoints").glob("step-*")] == ["step-000001"]
    assert (trainer.folder / "metrics.jsonl").read_text().count("\n") == 1
    assert (trainer.folder / ".lock").exists()
