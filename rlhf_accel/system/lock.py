"""A lock file: one process at a time holds a folder. The lock ends with its holder, also on another machine.

It combines two mechanisms, since each fails somewhere. The system's lock on the file ends with the process, however
that dies, but on a network disk it may not reach other machines, or not exist. So the file also names its holder: a
process of this machine is looked up, for one on another machine the heartbeat is watched. A holder whose heartbeat
paused for so long that it was presumed dead finds another name in the file, and has to stop. Knows files, processes and
the clock; knows no run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import psutil

from rlhf_accel.system.errors import ConfigError

BEAT = 5.0  # seconds between heartbeats
SILENT = 30.0  # seconds without one, after which a holder on another machine is presumed dead
# Seconds to wait for a live holder, which may be about to end: Slurm requeues a job while it kills its processes.
HERE, ELSEWHERE = 10.0, 90.0
_POLL = 0.25
NEWER_RUN = "a newer run of this process"
_SIZE = 1024  # bytes of the file: constant, so that one write replaces the content and needs no new disk space


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The process that holds a lock. `machine` identifies a boot and a container, `token` this lock."""

    host: str
    machine: str
    pid: int
    started: float
    since: str
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


@dataclass(kw_only=True)
class _Held:
    path: Path
    handle: int
    holder: Holder
    ended: threading.Event = field(default_factory=threading.Event)
    passed_on: bool = False  # to another lock of this process


class Lock:
    """A lock that this process holds, until `release` or until the object is deleted."""

    def __init__(self, held: _Held) -> None:
        self._held = held
        self.release = weakref.finalize(self, _release, held)
        threading.Thread(target=_repeat, args=(held,), daemon=True, name="lock").start()

    def lost_to(self) -> str | None:
        """The holder that has taken over the folder; None while this lock holds it, or after `release`."""
        if self._held.passed_on:
            return NEWER_RUN
        return None if self._held.ended.is_set() else _taken_by(self._held)


_held_here: dict[Path, _Held] = {}


def hold(path: Path, name: str, key: str, log: Callable[[str], None] = lambda _: None) -> Lock:
    """Take the lock file at `path`, in an existing folder; messages begin with `name`.

    If the holder is alive this waits, for `HERE` seconds on this machine and `ELSEWHERE` on another; a dead one loses
    the lock. A lock that this process already holds passes to the new one. Raises `ConfigError`, with the holder and
    `key`, if the holder does not end, and `OSError` if the file cannot be written.
    """
    path = path.resolve()
    before = _held_here.get(path)
    if before is not None:
        before.passed_on = True
        _release(before)
    watch = _Watch()
    while True:
        found = _attempt(path, watch)
        if isinstance(found, _Held):
            _held_here[path] = found
            return Lock(found)
        patience = HERE if found is None or found.machine == _machine() else ELSEWHERE
        if watch.seconds() > patience:
            raise ConfigError(
                f"{name} is in use by another run ({found or 'its process is not known'}); wait for its end, stop it, "
                "or name another folder",
                key=key,
                **({} if found is None else {"host": found.host, "pid": found.pid, "since": found.since}),
            )
        if not watch.announced:
            watch.announced = True
            log(f"{name} is in use ({found or 'its process is not known'}): waiting up to {patience:.0f} s for its end")
        time.sleep(_POLL)


class _Watch:
    """Observes a holder while waiting for it. Its clock is not trusted: a beat counts from when it is seen."""

    def __init__(self) -> None:
        self.announced = False
        self._start = time.monotonic()
        self._seen: tuple[str, int] | None = None
        self._since = self._start

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def is_gone(self, holder: Holder, locked: bool | None) -> bool:
        """Whether the holder is dead. `locked`: whether this process got the system's lock, None if there is none."""
        if holder.machine == _machine():
            return locked is not False and not _is_alive(holder)
        if (holder.token, holder.beat) != self._seen:
            self._seen, self._since = (holder.token, holder.beat), time.monotonic()
        return time.monotonic() - self._since > SILENT


def _attempt(path: Path, watch: _Watch) -> _Held | Holder | None:
    """The lock, or its holder: None for a holder that has not written its name yet."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        locked, holder = _system_lock(handle), _read(handle)
        free = locked is not False if holder is None else watch.is_gone(holder, locked)
        if not free or not _is_at(path, handle):  # a holder that ends removes the file, which may be this one
            os.close(handle)
            return holder
        held = _Held(path=path, handle=handle, holder=_this_process())
        _write(handle, held.holder)
    except BaseException:
        with suppress(OSError):
            os.close(handle)
        raise
    return held


def _repeat(held: _Held) -> None:
    """Heartbeats, the first soon after the start: if two processes took over at once, the earlier one notices."""
    wait = min(1.0, BEAT)
    while not held.ended.wait(wait):
        wait = BEAT
        with suppress(OSError):
            if _taken_by(held) is not None:
                return
            held.holder = replace(held.holder, beat=held.holder.beat + 1)
            _write(held.handle, held.holder)


def _taken_by(held: _Held) -> str | None:
    # Through the open handle: closing a second one on the same file would end the system's lock (fcntl(2)).
    with suppress(OSError):
        now = _read(held.handle)
        if now is not None and now.token != held.holder.token:
            return str(now)
        if held.path.exists() and not _is_at(held.path, held.handle):
            return "another process"
    return None


def _release(held: _Held) -> None:
    if held.ended.is_set() or held.holder.pid != os.getpid():  # a forked child also runs this at its end
        return
    held.ended.set()
    if _held_here.get(held.path) is held:
        del _held_here[held.path]
    with suppress(OSError):
        if _taken_by(held) is None and _is_at(held.path, held.handle):
            held.path.unlink()
    with suppress(OSError):
        os.close(held.handle)


def _system_lock(handle: int) -> bool | None:
    """Whether this process has the lock now; None if the disk does not support locks."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EAGAIN, errno.EACCES) else None
    return True


def _read(handle: int) -> Holder | None:
    with suppress(ValueError, TypeError, RecursionError):
        holder = Holder(**json.loads(os.pread(handle, _SIZE, 0)))
        if all(isinstance(getattr(holder, name), kind) for name, kind in _KINDS.items()):
            return holder
    return None


_KINDS = {"host": str, "machine": str, "pid": int, "started": float, "since": str, "token": str, "beat": int}


def _write(handle: int, holder: Holder) -> None:
    os.pwrite(handle, json.dumps(asdict(holder)).encode().ljust(_SIZE)[:_SIZE], 0)
    os.fsync(handle)


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _is_alive(holder: Holder) -> bool:
    try:
        os.kill(holder.pid, 0)
        process = psutil.Process(holder.pid)
        # The start time is only known to a second or so; a zombie holds nothing.
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder.started) < 2
    except (ProcessLookupError, OverflowError, ValueError, psutil.NoSuchProcess):
        return False
    except (PermissionError, psutil.AccessDenied):  # another user's process
        return True


def _this_process() -> Holder:
    return Holder(
        host=socket.gethostname()[:200],
        machine=_machine(),
        pid=os.getpid(),
        started=psutil.Process().create_time(),
        since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        token=uuid.uuid4().hex,
    )


@cache
def _machine() -> str:
    """This boot of this machine, and the container on it, within which a process is identified by its number."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()[:200]} {psutil.boot_time():.0f}"
