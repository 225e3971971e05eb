"""A reward function cannot change the run around it: what is global is put back, and one line names it."""

import gc
import locale
import logging
import os
import signal
import socket
import sys
import threading
import warnings

import pytest
import torch

from rlhf_accel.reward import Reward, RewardError, borrowed, import_function
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests import forks
from tests.conftest import share_of_o

HELD = []  # what a function leaves open


def enter(context) -> None:
    context.__enter__()
    HELD.append(context)


# What a function may leave changed, how, and how it reads before and after.
CHANGES = {
    "torch.set_grad_enabled": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "torch.inference_mode": (lambda: enter(torch.inference_mode()), torch.is_inference_mode_enabled),
    "torch.autocast": (
        lambda: enter(torch.autocast("cpu", torch.bfloat16)),
        lambda: (torch.ones(2, 2) @ torch.ones(2, 2)).dtype,
    ),
    "torch.set_default_dtype": (lambda: torch.set_default_dtype(torch.float64), lambda: torch.zeros(1).dtype),
    "torch.set_default_device": (lambda: torch.set_default_device("meta"), lambda: torch.zeros(1).device),
    "torch.set_num_threads": (lambda: torch.set_num_threads(3), torch.get_num_threads),
    "torch.use_deterministic_algorithms": (
        lambda: torch.use_deterministic_algorithms(True),
        torch.are_deterministic_algorithms_enabled,
    ),
    "torch.autograd.set_detect_anomaly": (lambda: torch.autograd.set_detect_anomaly(True), torch.is_anomaly_enabled),
    "os.chdir": (lambda: os.chdir("/"), os.getcwd),
    "environment variables": (
        lambda: os.environ.update(CUDA_VISIBLE_DEVICES="7", RANK="1"),
        lambda: (os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("RANK")),
    ),
    "signal handlers": (
        lambda: [signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)],
        lambda: (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
    ),
    "signal.alarm": (lambda: signal.alarm(100), lambda: signal.getitimer(signal.ITIMER_REAL)),
    "warnings.simplefilter": (lambda: warnings.simplefilter("error"), lambda: list(map(str, warnings.filters[:3]))),
    "logging.disable": (lambda: logging.disable(logging.CRITICAL), lambda: logging.getLogger("x").isEnabledFor(40)),
    "locale": (lambda: locale.setlocale(locale.LC_ALL, "C.UTF-8"), lambda: locale.setlocale(locale.LC_ALL)),
    "sys.setrecursionlimit": (lambda: sys.setrecursionlimit(500), sys.getrecursionlimit),
    "socket.setdefaulttimeout": (lambda: socket.setdefaulttimeout(0.1), socket.getdefaulttimeout),
    "gc.disable": (gc.disable, gc.isenabled),
    "sys.stdout or sys.stderr": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
}


@pytest.fixture(autouse=True)
def untold(monkeypatch):
    monkeypatch.setattr(borrowed, "_told", set())
    HELD.clear()
    given = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, given)  # in which the files of other tests are read


# Only the main thread can set a signal handler, and a reward with a timeout is called in another.
THREADED = [(name, timeout) for name in CHANGES for timeout in (None, 30.0) if name != "signal handlers" or not timeout]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize(("name", "timeout"), THREADED)
def test_what_a_reward_leaves_changed_is_put_back_and_named_once(name, raises, timeout, caplog) -> None:
    change, read = CHANGES[name]
    if name == "locale":
        locale.setlocale(locale.LC_ALL, "C")

    def careless(prompts, responses):
        change()
        if raises:
            raise KeyError("careless")
        return [1.0] * len(responses)

    threaded = timeout is not None
    reward = Reward(terms=(("reward=careless", 1.0, careless),), timeout=timeout)
    before = read()
    for _ in range(2):
        if raises:
            with pytest.raises(RewardError, match="KeyError"):
                reward(["a"], ["b"], {})
        else:
            assert reward(["a"], ["b"], {}).tolist() == [1.0]
        assert read() == before
    told = [record.getMessage() for record in caplog.records if "left changed" in record.getMessage()]
    of_a_thread = {"torch.set_grad_enabled", "torch.inference_mode", "torch.autocast", "torch.set_default_device"}
    of_a_thread |= {"torch.set_num_threads"}
    if threaded and name in of_a_thread:
        assert told == []  # it was the thread's own, and has ended with it
    else:
        assert len(told) == 1
        assert told[0].startswith(f"reward=careless left changed: {name}")


def test_another_seed_is_put_back_and_drawing_is_not_held_against_anybody(caplog) -> None:
    torch.manual_seed(5)
    with borrowed.restored_globals("draws"):
        torch.rand(3)
    assert not caplog.records
    after = torch.rand(1)
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(after, torch.rand(1))  # as without us
    state = torch.get_rng_state()
    with borrowed.restored_globals("seeds"):
        torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert "seeds left changed: torch.manual_seed" in caplog.text


def test_filters_that_libraries_add_when_they_are_imported_stay(caplog) -> None:
    with warnings.catch_warnings(), borrowed.restored_globals("imports"):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="of this library")
    assert not caplog.records


class Odd(BaseException):
    """Not an Exception."""

    def __str__(self) -> str:
        raise TypeError("no text")


@pytest.mark.parametrize("kind", [Odd, GeneratorExit, SystemExit, StopIteration, RecursionError])
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_whatever_a_reward_raises_is_one_line(kind, timeout) -> None:
    def bad(prompts, responses):
        raise kind

    with pytest.raises(RewardError, match=rf"reward=bad raised {kind.__name__}"):
        Reward(terms=(("reward=bad", 1.0, bad),), timeout=timeout)(["a"], ["b"], {})


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_ctrl_c_stays_ctrl_c(timeout) -> None:
    def stopped(prompts, responses):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reward(terms=(("reward=stopped", 1.0, stopped),), timeout=timeout)(["a"], ["b"], {})


class Unreadable:
    def __len__(self) -> int:
        raise KeyError("no length")

    __getitem__ = __array__ = __repr__ = __len__


def test_what_cannot_be_read_is_one_line() -> None:
    with pytest.raises(RewardError, match="reward=bad returned an object of type Unreadable; return one number"):
        Reward(terms=(("reward=bad", 1.0, lambda prompts, responses: Unreadable()),))(["a"], ["b"], {})


def test_a_module_that_ends_the_process_or_changes_it_when_imported(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "leaving_module.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"leaving_module cannot be imported \(SystemExit: 0\)"):
        import_function("leaving_module:f")
    (tmp_path / "changing_module.py").write_text(
        "import torch\ntorch.set_grad_enabled(False)\ndef f(prompts, responses): return [0.0] * len(responses)\n"
    )
    assert import_function("changing_module:f")([], []) == []
    assert torch.is_grad_enabled()
    assert "importing changing_module left changed: torch.set_grad_enabled" in caplog.text


def test_a_run_under_a_careless_reward_is_the_run_under_a_careful_one(tiny, tmp_path) -> None:
    """With LoRA's dropout, whose masks are torch's random numbers."""

    def careless(prompts, responses, **columns):
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.manual_seed(0)
        os.chdir("/")
        warnings.simplefilter("error")
        return share_of_o(prompts, responses)

    rows = []
    for name, reward in (("careful", share_of_o), ("careless", careless)):
        folder = tmp_path / name
        settings = {"run": {"output_dir": str(folder), "total_steps": 2}, "lora": {"r": 2, "dropout": 0.3}}
        trainer = PPOTrainer(tiny(**settings, reward={"function": []}), reward=reward)
        trainer.fit()
        weights = trainer.runtime.trainable_weights()
        rows.append({key: weight.clone() for key, weight in weights.items()})
    assert rows[0].keys() == rows[1].keys()
    assert all(torch.equal(rows[0][key], rows[1][key]) for key in rows[0])


CLOSES = """
import os, sys
from rlhf_accel.reward.borrowed import restored_globals
with restored_globals("reward=closes"):
    sys.stdout.close()
    os.close(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
kept = open(sys.argv[1], "w")
print("still printed", flush=True)
"""


def test_streams_that_a_reward_closes_are_open_again(tmp_path) -> None:
    done = forks.run([sys.executable, "-c", CLOSES, tmp_path / "kept"])
    assert done.returncode == 0, done.stderr
    assert done.stdout == "still printed\n" and not (tmp_path / "kept").read_text()
    assert "reward=closes left changed: file descriptor 1, file descriptor 2, sys.stdout or sys.stderr" in done.stderr


CLOSES_GUARDED = """
import sys
from rlhf_accel.system import console
from rlhf_accel.reward.borrowed import restored_globals
with console.guarded():
    guard = sys.stdout
    for close in (sys.stdout.close, sys.__stdout__.close):
        with restored_globals("reward=closes"):
            close()
        assert sys.stdout is guard
        print("still printed", flush=True)
"""


def test_the_guard_of_a_console_outlives_a_reward_that_closes_it() -> None:
    done = forks.run([sys.executable, "-c", CLOSES_GUARDED])
    assert (done.returncode, done.stdout) == (0, "still printed\n" * 2), done.stderr


def test_no_thread_and_no_descriptor_is_left(tmp_path) -> None:
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with borrowed.restored_globals("quiet"):
            pass
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
