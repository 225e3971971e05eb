"""Global settings of torch and of the process, restored after a call of a function from elsewhere.

A reward function that turns gradients off, sets another dtype, closes stdout or changes the working folder would change
the run around it. Knows torch and the process; knows nothing about the function.
"""

from __future__ import annotations

import gc
import locale
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf_accel.system.console import Stream

logger = logging.getLogger(__name__)

# Variables that this package, torch, the launchers or the hub's client read after the start. A library that is imported
# late may set other variables.
_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "HOME", "PATH"),
    *("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN"),
    *("RLHF_ACCEL_CACHE", "RLHF_ACCEL_REWARD_TOKEN"),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM, signal.SIGCHLD)
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class _Setting:
    """`write(read())` changes nothing; two equal readings mean that the setting is unchanged."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


@contextmanager
def restored_globals(borrower: str) -> Iterator[None]:
    """Restore the settings of torch and of the process that the block changes. Takes 0.2 to 0.4 ms.

    A warning with `borrower` names each changed setting once. Some of torch's settings belong to a thread; changes by
    another thread do not need to be restored.
    """
    before = [setting.read() for setting in _SETTINGS]
    changed: list[str] = []
    try:
        with _descriptors(changed):
            yield
    finally:
        for setting, value in zip(_SETTINGS, before, strict=True):
            if setting.read() != value:
                with suppress(Exception):  # a setting that cannot be restored is still named
                    setting.write(value)
                changed.append(setting.name)
        new = [name for name in changed if (borrower, name) not in _told]
        if new:
            _told.update((borrower, name) for name in new)
            logger.warning("%s left changed: %s; put back, now and after each call", borrower, ", ".join(new))


@contextmanager
def _descriptors(changed: list[str]) -> Iterator[None]:
    """Restore the file descriptors of stdout and stderr, and append the name of a changed one to the list.

    If one stayed closed, the next file to be opened would get its number, and with it all printed text.
    """
    kept = {}
    for number in (1, 2):
        with suppress(OSError):  # already closed
            kept[number] = _identity(number), os.dup(number)
    try:
        yield
    finally:
        for number, (identity, copy) in kept.items():
            if _identity(number) != identity:
                os.dup2(copy, number)
                changed.append(f"file descriptor {number}")
            os.close(copy)


def _identity(descriptor: int) -> tuple[int, int] | None:
    try:
        status = os.fstat(descriptor)
    except OSError:
        return None
    return status.st_dev, status.st_ino


@dataclass(frozen=True)
class _RandomState:
    """A reward may draw random numbers; if it sets a seed, every step would get the same dropout masks."""

    seed: int
    states: tuple[Tensor, ...] = field(compare=False)

    @classmethod
    def read(cls) -> _RandomState:
        of_gpu = (torch.cuda.get_rng_state(),) if torch.cuda.is_initialized() else ()
        return cls(torch.initial_seed(), (torch.get_rng_state(), *of_gpu))

    def write(self) -> None:
        torch.set_rng_state(self.states[0])
        for state in self.states[1:]:
            torch.cuda.set_rng_state(state)


def _read_device() -> Any:
    return torch.get_default_device()


def _write_device(device: torch.device) -> None:
    torch.set_default_device(None if device.type == "cpu" else device)


_guards: list[Any] = []  # the mode lasts as long as its guard


def _write_inference(on: bool) -> None:
    guard = torch.inference_mode(on)
    guard.__enter__()
    _guards.append(guard)


def _read_deterministic() -> tuple[bool, ...]:
    cudnn = torch.backends.cudnn
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns, cudnn.deterministic, cudnn.benchmark


def _write_deterministic(flags: tuple[bool, ...]) -> None:
    torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags[2:]


def _read_autocast() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))


def _write_autocast(flags: tuple[bool, ...]) -> None:
    for kind, on in zip(("cpu", "cuda"), flags, strict=True):
        torch.set_autocast_enabled(kind, on)


def _read_gpu() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


def _write_gpu(device: int | None) -> None:
    if device is not None:
        torch.cuda.set_device(device)


def _read_folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # the folder was removed
        return None


def _write_folder(path: str | None) -> None:
    if path is not None:
        os.chdir(path)


def _read_variables() -> tuple[str | None, ...]:
    return tuple(map(os.environ.get, _VARIABLES))


def _write_variables(values: tuple[str | None, ...]) -> None:
    for name, value in zip(_VARIABLES, values, strict=True):
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _read_signals() -> tuple[Any, ...]:
    """Handlers, and the wakeup file descriptor, which only the main thread can read."""
    woken = -1
    if threading.current_thread() is threading.main_thread():
        woken = signal.set_wakeup_fd(-1)
        if woken != -1:
            signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    return woken, *map(signal.getsignal, _SIGNALS)


def _write_signals(values: tuple[Any, ...]) -> None:
    signal.set_wakeup_fd(values[0], warn_on_full_buffer=False)
    for number, handler in zip(_SIGNALS, values[1:], strict=True):
        if handler is not None:  # None is a handler that Python did not set
            signal.signal(number, handler)


def _read_alarm() -> bool:
    return signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _write_alarm(running: bool) -> None:
    if not running:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hides_all(entry: tuple[Any, ...]) -> bool:
    _, message, category, module, _ = entry
    return message is None and module is None and issubclass(UserWarning, category)


def _read_filters() -> tuple[Any, ...]:
    """Filters that match every warning; libraries add other filters when they are imported."""
    return tuple(entry for entry in warnings.filters if _hides_all(entry))


class _Never(Warning):
    """A category that no warning has."""


def _write_filters(before: tuple[Any, ...]) -> None:
    kept = [entry for entry in warnings.filters if not _hides_all(entry) or entry in before]
    kept[:0] = [entry for entry in before if entry not in kept]
    warnings.filters[:] = kept  # type: ignore[index]  # typeshed calls it a sequence
    warnings.simplefilter("default", _Never, append=True)  # resets Python's cache of decisions


def _read_streams() -> tuple[Any, ...]:
    return tuple((stream, getattr(stream, "closed", False)) for stream in (sys.stdout, sys.stderr))


def _write_streams(before: tuple[Any, ...]) -> None:
    for descriptor, name, (stream, was_closed) in zip((1, 2), ("stdout", "stderr"), before, strict=True):
        if getattr(stream, "closed", False) and not was_closed:
            opened = open(descriptor, "w", buffering=1, encoding=stream.encoding, errors=stream.errors, closefd=False)  # noqa: SIM115
            if isinstance(stream, Stream):  # the guard stays in place around the new stream
                stream.put(opened)
            else:
                stream = opened
        setattr(sys, name, stream)


_SETTINGS = (
    # First, because it changes whether gradients are on.
    _Setting("torch.inference_mode", torch.is_inference_mode_enabled, _write_inference),
    _Setting("torch.set_grad_enabled", torch.is_grad_enabled, torch.set_grad_enabled),
    _Setting("torch.autocast", _read_autocast, _write_autocast),
    _Setting("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
    _Setting("torch.set_default_device", _read_device, _write_device),
    _Setting("torch.cuda.set_device", _read_gpu, _write_gpu),
    _Setting("torch.set_num_threads", torch.get_num_threads, torch.set_num_threads),
    _Setting(
        "torch.set_float32_matmul_precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    _Setting("torch.use_deterministic_algorithms or cudnn's flags", _read_deterministic, _write_deterministic),
    _Setting("torch.autograd.set_detect_anomaly", torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    _Setting("torch.manual_seed", _RandomState.read, _RandomState.write),
    _Setting("os.chdir", _read_folder, _write_folder),
    _Setting("environment variables", _read_variables, _write_variables),
    _Setting("signal handlers", _read_signals, _write_signals),
    _Setting("signal.alarm", _read_alarm, _write_alarm),
    _Setting("warnings.simplefilter", _read_filters, _write_filters),
    _Setting("logging.disable", lambda: logging.root.manager.disable, logging.disable),
    _Setting("locale", lambda: locale.setlocale(locale.LC_ALL), lambda value: locale.setlocale(locale.LC_ALL, value)),
    _Setting("sys.setrecursionlimit", sys.getrecursionlimit, sys.setrecursionlimit),
    _Setting("socket.setdefaulttimeout", socket.getdefaulttimeout, socket.setdefaulttimeout),
    _Setting("gc.disable", gc.isenabled, lambda on: gc.enable() if on else gc.disable()),
    _Setting("sys.stdout or sys.stderr", _read_streams, _write_streams),
)
