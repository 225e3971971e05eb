"""A run that is killed, told to stop, or left without a disk, and what it is when it goes on: the run that never was.

The long form, `-m long`, kills one run thirty times and runs of two processes five times each.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlhf_accel.config.loading import to_yaml
from rlhf_accel.config.schema import Config
from rlhf_accel.system import signals
from rlhf_accel.system.errors import RunFailed
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests import forks
from tests.distributed.conftest import tree
from tests.distributed.launch import ROOT, environment, launched, truly_cut

pytestmark = pytest.mark.usefixtures("exact_fp32")

TRAIN = ROOT / "scripts" / "train.py"


def lines(path: Path) -> list[str]:
    """The rows of a .jsonl file as they stand, without what the clock and the memory say."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return [json.dumps({k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))}) for row in rows]


def assert_same_bytes(one: Path, other: Path) -> None:
    """Metrics, samples and every file of weights."""
    assert lines(one / "metrics.jsonl") == lines(other / "metrics.jsonl")
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    for which in ("final", "best"):
        files = sorted(path.relative_to(one) for path in (one / which).rglob("*.safetensors"))
        assert files == sorted(path.relative_to(other) for path in (other / which).rglob("*.safetensors"))
        assert len(files) >= 2
        for file in files:
            assert (one / file).read_bytes() == (other / file).read_bytes(), file


def long_run(gpt2: Path, prompts: Path, steps: int) -> dict[str, Any]:
    """All that outlives a step: Adam's moments, schedule, adaptive KL, calibration, best score, dropout's numbers."""
    return tree(
        gpt2,
        prompts,
        {
            "run": {"total_steps": steps, "save_every": 2, "eval_every": 3, "sample_count": 2},
            "lora": {"r": 4, "dropout": 0.2},
            "reward": {"calibrate": True, "calibrate_samples": 16, "function": "tests.test_nonfinite:with_noise"},
            "ppo": {"kl_target": 0.1, "kl_horizon": 32},
            "optim": {"warmup_steps": 3, "lr": 3e-3},
        },
    )


def with_noise(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward that draws from all three global generators."""
    noise = float(torch.rand(())) + random.random()
    return [response.count("o") + 0.01 * noise for response in responses]


class Victim:
    """A run that is started again and again by one command, and killed with all of its processes."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.command, self.folder = command, folder

    def start(self) -> forks.Forked:
        self.output = (self.folder.parent / "output.txt").open("ab")
        return forks.Forked(self.command, cwd=ROOT, env=environment(), stdout=self.output, stderr=self.output)

    def phases(self) -> int:
        log = self.folder / "logs" / "rank-0.log"
        return log.read_text().count("\n") if log.exists() else 0

    def kill_after(self, phases: float) -> bool:
        """Start it, and kill it when its log shows that so many phases were entered, the last of them in part; False if
        it was done before."""
        before, process, entered = self.phases(), self.start(), [time.monotonic()]
        while len(entered) <= int(phases) and process.poll() is None:
            entered += [time.monotonic()] * (self.phases() - before + 1 - len(entered))
            time.sleep(0.002)
        if len(entered) > 2:  # of the phase that goes on, by how long the one before it took
            time.sleep((phases % 1) * (entered[-1] - entered[-2]))
        alive = process.poll() is None
        if alive:
            family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
            for member in family:
                member.kill()
            psutil.wait_procs(family)
        process.wait()
        return alive

    def finish(self) -> None:
        assert self.start().wait() == 0, (self.folder.parent / "output.txt").read_text()[-5000:]


def kill_and_go_on(
    command: Callable[[Path], list[str]], folder: Path, kills: int, most: int, same: Callable[[Path, Path], None]
) -> None:
    """`most` is the number of phases after which it is killed at the latest; a step has three or more."""
    whole, victim = Victim(command(folder / "whole"), folder / "whole"), Victim(command(folder / "run"), folder / "run")
    folder.mkdir(exist_ok=True)
    whole.finish()
    moments, done = random.Random(0), 0
    for _ in range(3 * kills):
        done += victim.kill_after(moments.uniform(1, most))
        if done == kills:
            break
    assert done == kills, "it was finished before it was killed often enough"
    victim.finish()
    same(whole.folder, victim.folder)


def command_for(config: dict[str, Any], folder: Path, launch: Callable[..., list[str]]) -> Callable[[Path], list[str]]:
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return lambda run: launch(
        *("--config", str(folder / "config.yaml"), "--run.output_dir", str(run), "--run.resume", "auto")
    )


@pytest.mark.parametrize(
    ("kills", "steps", "most"),
    [(2, 12, 18), pytest.param(30, 240, 24, marks=pytest.mark.long)],
    ids=["short", "long"],
)
def test_killed_at_any_moment_it_is_the_run_that_never_was(
    kills: int, steps: int, most: int, gpt2_folder: Path, prompts_file: Path, tmp_path: Path
) -> None:
    config = long_run(gpt2_folder, prompts_file, steps)
    command = command_for(config, tmp_path, lambda *options: [sys.executable, str(TRAIN), *options])
    kill_and_go_on(command, tmp_path / "runs", kills, most, assert_same_bytes)


@pytest.mark.long
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_two_processes_killed_at_any_moment(config: str, gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    from tests.distributed.test_world_size import assert_same_row, assert_same_weights, rows

    settings = tree(gpt2_folder, prompts_file, {"run": {"total_steps": 40, "save_every": 2, "eval_every": 3}})
    options = truly_cut(tmp_path, config) if config == "zero3" else []

    def same(one: Path, other: Path) -> None:
        assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
        metrics, others = rows(one / "metrics.jsonl"), rows(other / "metrics.jsonl")
        assert [row["step"] for row in others] == list(range(1, 41))
        for row, other_row in zip(metrics, others, strict=True):
            assert_same_row(row, other_row, rel=1e-6, floor=1e-7)
        assert_same_weights(one / "final", other / "final", 1e-6)

    command = command_for(settings, tmp_path, lambda *rest: launched(config, 2, TRAIN, *rest, options=options))
    kill_and_go_on(command, tmp_path / "runs", 5, 24, same)


# Signals


PHASES = ["rollout of step 2", "score of step 2", "update of step 2", "saving after step 2", "evaluation after step 2"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *[(phase, signal.SIGTERM) for phase in PHASES],
        ("evaluation after step 0", signal.SIGUSR1),
        ("rollout of step 1", signal.SIGUSR1),
        ("evaluation after step 4", signal.SIGUSR1),
    ],
)
def test_a_signal_in_any_phase_ends_with_a_checkpoint_and_nothing_is_lost(
    phase: str, number: int, tiny, tmp_path: Path, whole_run: Path, signalled, capsys
) -> None:
    run = {"total_steps": 4, "save_every": 2, "eval_every": 2, "sample_every": 1}
    if not whole_run.exists():
        PPOTrainer(tiny(run={**run, "output_dir": str(whole_run)})).fit()
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    signalled(phase, number)
    with pytest.raises(SystemExit) as left:
        PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "run")})).fit()
    assert left.value.code == 143
    output = capsys.readouterr()
    assert f"stopped by {signal.Signals(number).name} after step" in output.out
    assert "--run.resume latest" in output.out
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    if phase == "update of step 2":  # the evaluation that is due then waits for the run to go on
        assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 1
    PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "run"), "resume": "latest"})).fit()
    assert_same_bytes(whole_run, tmp_path / "run")
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole_run, tmp_path / "run")]
    assert [{**summary, "seconds": 0} for summary in summaries] == [{**summaries[0], "seconds": 0}] * 2
    assert len(summaries[1]["samples"]) > 0


def test_a_step_whose_evaluation_waited_is_recorded_once(tiny, tmp_path: Path, whole_run: Path, signalled) -> None:
    """Though the run is killed after it was recorded, and before the next checkpoint."""
    run = {"total_steps": 4, "save_every": 4, "eval_every": 2, "sample_every": 1, "output_dir": str(tmp_path / "run")}
    signalled("update of step 2", signal.SIGTERM)
    with pytest.raises(SystemExit):
        PPOTrainer(tiny(run=run)).fit()
    killed = PPOTrainer(tiny(run={**run, "resume": "latest"}))
    killed.prepare()
    killed.run.recorder.open(killed.progress, killed.run.resume_from)
    killed.run._conclude()
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 2
    PPOTrainer(tiny(run={**run, "resume": "latest"})).fit()
    assert [json.loads(row)["step"] for row in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_status_as_seen_from_outside(gpt2_folder: Path, prompts_file: Path, tmp_path: Path) -> None:
    config = tree(gpt2_folder, prompts_file, {"run": {"eval_samples": 0, "total_steps": 9999}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, str(TRAIN), "--config", str(tmp_path / "config.yaml"), "--run.output_dir"]
    process = forks.Forked([*command, str(tmp_path / "run")], cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert (process.returncode, said.decode().splitlines()[-1]) == (
        143,
        "SIGTERM: finishing this phase, then saving and exiting; a second signal exits at once",
    )
    latest = (tmp_path / "run" / "checkpoints" / "latest").read_text()
    assert latest == f"step-{len(lines(metrics)):06d}"


def test_a_second_signal_is_obeyed_at_once() -> None:
    """Also in a call that no handler interrupts, such as one that waits for other processes: a lock that is held."""
    script = """
import ctypes, os, signal, threading, time
from rlhf_accel.system.signals import StopRequest
with StopRequest() as request:
    os.kill(os.getpid(), signal.SIGUSR1)
    assert request.received == "SIGUSR1"
    print("still here", flush=True)
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    mutex = ctypes.create_string_buffer(128)
    lock = ctypes.CDLL(None).pthread_mutex_lock
    lock(mutex), lock(mutex)
    print("not any more", flush=True)
"""
    done = forks.run([sys.executable, "-c", script], cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout) == (143, "still here\n")
    assert done.stderr.splitlines()[-1] == "SIGTERM again: exiting at once"


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Python's own answer to SIGINT, which a shell's background job is started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_says_where_it_stands(tiny, tmp_path: Path, signalled) -> None:
    signalled("update of step 3", signal.SIGINT)
    config = tiny(run={"total_steps": 4, "save_every": 2, "output_dir": str(tmp_path / "run")})
    with pytest.raises(KeyboardInterrupt) as stopped:
        PPOTrainer(config).fit()
    assert str(stopped.value) == (
        f"stopped by Ctrl-C in update of step 3 (of 4); the last checkpoint is {tmp_path}/run/checkpoints/step-000002, "
        f"resume with --run.output_dir {tmp_path}/run --run.resume latest"
    )


# Disks


def on_faulty_disk(what: str, config: Config) -> tuple[dict[str, int], str]:
    if not forks.has_faulty_disk():
        pytest.skip("no C compiler here (or no glibc): disks that fail are not tested")
    folder = Path(str(config.run.output_dir))
    path = folder.with_name("faulty.yaml")
    path.write_text(to_yaml(config), encoding="utf-8")
    under = folder / "checkpoints" if what == "every" else folder
    command = [sys.executable, "-m", "tests.disk_worker", what, path]
    done = forks.run(command, cwd=ROOT, env=environment(FAULTY_DISK=str(under)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_whichever_call_of_a_save_fails_the_newest_checkpoint_is_whole(tiny, tmp_path: Path) -> None:
    run = {"total_steps": 2, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "run")}
    config = tiny(run={**run, "max_failed_saves": 1000}, lora={"r": 2})
    counts, _ = on_faulty_disk("every", config)
    assert counts.keys() == {"ENOSPC", "EIO"}
    assert min(counts.values()) > 25  # five files, each made, written and flushed; folders, renames


def test_a_full_disk_does_not_end_a_run_and_loses_nothing(tiny, tmp_path: Path) -> None:
    run = {"total_steps": 6, "save_every": 1, "eval_every": 1, "sample_every": 1, "trackers": ["tensorboard"]}
    PPOTrainer(tiny(run={**run, "output_dir": str(tmp_path / "whole")})).fit()
    config = tiny(run={**run, "output_dir": str(tmp_path / "run"), "max_failed_saves": 4})
    counts, said = on_faulty_disk("full", config)
    assert counts["calls"] > 10
    assert said.count("could not be written: No space left on device") == 3
    assert "warning: the checkpoint of step 3 could not be written" in said
    assert "2 more such failures end the run" in said
    assert lines(tmp_path / "whole" / "metrics.jsonl") == lines(tmp_path / "run" / "metrics.jsonl")
    assert (tmp_path / "whole" / "samples.jsonl").read_bytes() == (tmp_path / "run" / "samples.jsonl").read_bytes()
    for name, weight in load_file(tmp_path / "whole" / "final" / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "run" / "final" / "model.safetensors")[name], weight)


def test_a_failed_save_is_reported_once_with_how_to_resume(tiny, tmp_path: Path, capsys) -> None:
    """Not again after each step until one succeeds."""
    run = {"total_steps": 5, "save_every": 2, "eval_samples": 0, "output_dir": str(tmp_path / "run")}
    trainer = PPOTrainer(tiny(run={**run, "max_failed_saves": 2}))
    failures = iter([None, "No space left on device"])
    trainer.runtime.save_state = lambda folder, save=trainer.runtime.save_state: save(folder) or next(failures)
    trainer.fit()
    (warning,) = (line for line in capsys.readouterr().out.splitlines() if "could not be written" in line)
    assert warning == (
        "warning: the checkpoint of step 4 could not be written: No space left on device; 1 more such failure ends the "
        f"run; the last checkpoint is {tmp_path}/run/checkpoints/step-000002, resume with --run.output_dir "
        f"{tmp_path}/run --run.resume latest"
    )


def test_too_many_failed_saves_end_a_run(tiny, tmp_path: Path) -> None:
    run = {"total_steps": 6, "save_every": 1, "eval_samples": 0, "output_dir": str(tmp_path / "run")}
    trainer = PPOTrainer(tiny(run={**run, "max_failed_saves": 2}))
    failures = iter([None, "rank 1: No space left on device", "rank 1: No space left on device"])
    trainer.runtime.save_state = lambda folder, save=trainer.runtime.save_state: save(folder) or next(failures)
    with pytest.raises(RunFailed) as stopped:
        trainer.fit()
    assert str(stopped.value) == (
        "the checkpoint of step 3 could not be written: rank 1: No space left on device; run.max_failed_saves=2 have "
        f"failed in a row; free disk space, then: the last checkpoint is {tmp_path}/run/checkpoints/step-000001, "
        f"resume with --run.output_dir {tmp_path}/run --run.resume latest"
    )
    PPOTrainer(replace(trainer.config, run=replace(trainer.config.run, resume="latest"))).fit()
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 6
