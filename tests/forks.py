"""Processes without the seconds that imports take: a server that has imported the libraries and forks.

`Forked` is a `subprocess.Popen` for commands that start with this interpreter. The child is a fork of the server, not
of the process of the tests: it has no thread, no gradient and no patch of a test in it. What is read from the
environment at import is the server's: an empty hub cache, `hub_cache()`, that tests may fill, and MALLOC_*. Its disk
fails where a test says so (faulty_disk.c). With `bare` the child has not imported this package, only the libraries.

Under `accelerate launch`, run by `Forked`, the launcher's ranks are forks too; their environment and their end remain
the launcher's matter. `python(folder)` writes a program that stands for the interpreter where a script starts one.

    python -m tests.forks run WORDS…

does what `python WORDS…` does, as a fork.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
ADDRESS = "RLHF_ACCEL_TESTS_FORKS"
LIBRARIES = (
    "accelerate.commands.launch",
    "deepspeed.runtime.zero.muon.original_muon",  # which compiles as it is imported
    "deepspeed.runtime.zero.stage3",
    "matplotlib",
    "peft",
    "torch.distributed.run",
    "torch.utils.tensorboard",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.roberta.modeling_roberta",
)
PACKAGE = (
    "rlhf_accel.commands.doctor",
    "rlhf_accel.commands.evaluate",
    "rlhf_accel.training.ppo_trainer",
    "rlhf_accel.training.run",
    "rlhf_accel.training.reward_trainer",
)
_servers: list[subprocess.Popen] = []  # the one that this process started
_Popen = subprocess.Popen  # also where a test has put `Forked` in its place
BARE = ".bare"  # the end of the second socket's name
_STARTS = 180.0  # seconds that the server is given for its imports


class Forked(subprocess.Popen):
    """`subprocess.Popen([sys.executable, …])` by a fork of the server, in a session of its own. `closed` are those of
    its standard streams that it does not get; `bare`: without this package imported."""

    def __init__(
        self, command: Sequence[object], *, closed: Sequence[int] = (), bare: bool = False, **options: Any
    ) -> None:
        self._closed, self._bare = closed, bare
        super().__init__([str(word) for word in command], **options)

    def _execute_child(
        self,
        args: list[str],
        executable: Any,
        preexec_fn: Any,
        close_fds: Any,
        pass_fds: Any,
        cwd: Any,
        env: Any,
        *rest: Any,
    ) -> None:
        assert args[0] == sys.executable and not (executable or preexec_fn or pass_fds), args
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[3:9]
        request = {
            "command": args[1:],
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "closed": list(self._closed),
            "process": os.getpid(),
        }
        streams = [given if given != -1 else own for own, given in enumerate((p2cread, c2pwrite, errwrite))]
        self._connection = connect(BARE * self._bare)
        try:
            text = json.dumps(request).encode()
            socket.send_fds(self._connection, [struct.pack("i", len(text))], streams)
            self._connection.sendall(text)
            self.pid = struct.unpack("i", receive(self._connection, 4))[0]
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection, selectors.EVENT_READ)
            if not selector.select(0 if wait_flags else None):
                return 0, 0
        status = struct.unpack("i", receive(self._connection, 4))[0]
        self._connection.close()
        return self.pid, status

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:
        if self.returncode is None and (ended := self._try_wait(os.WNOHANG))[0]:
            self._handle_exitstatus(ended[1])
        return self.returncode


def run(command: Sequence[object], timeout: float | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command, capture_output=True, text=True, check=False)` by a fork of the server."""
    with Forked(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def python(folder: Path) -> Path:
    """A program in the folder that runs `python WORDS…` as a fork, in the network namespace that it is started in."""
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -m tests.forks as "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    start()
    return program


def hub_cache() -> Path:
    """Where the server and all its forks look for models and data sets of the hub, under names that one test uses."""
    return folder() / "hf_home" / "hub"


def has_faulty_disk() -> bool:
    """Whether the disk of forks can be made to fail; it takes a C compiler and glibc."""
    return (folder() / "faulty_disk.so").exists()


def folder() -> Path:
    """The server's own."""
    start()
    return Path(os.environ[ADDRESS]).parent


def receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the server of forks closed the connection")
        received += part
    return received


def start(build: bool = False) -> None:
    """Starts the server of this test session, unless there is one; it ends with the process that started it. With
    `build` it compiles, beside the tests, what tests under DeepSpeed will ask for."""
    if ADDRESS in os.environ:
        return
    own = tempfile.TemporaryDirectory(prefix="forks-")
    path = f"{own.name}/socket"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"TOKENIZERS_PARALLELISM": "false", **offline_environment(Path(own.name, "hf_home", "hub"))}
    library = Path(own.name, "faulty_disk.so")
    with suppress(OSError, subprocess.CalledProcessError):
        compile_faulty_disk(library)
        environment["LD_PRELOAD"] = str(library)
    server = _Popen(
        [sys.executable, "-m", "tests.forks", path, str(os.getpid()), *["build"] * build],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    os.environ[ADDRESS] = path
    _servers.append(server)

    def end() -> None:
        server.kill()
        server.wait()
        own.cleanup()

    atexit.register(end)


def compile_faulty_disk(library: Path) -> None:
    source = Path(__file__).with_name("faulty_disk.c")
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def offline_environment(hub_cache: Path) -> dict[str, str]:
    """Variables for a process that reads this cache and no other; the libraries read them when they are imported."""
    home = hub_cache.parent
    return {
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(hub_cache),
        "HF_DATASETS_CACHE": str(home / "datasets"),
        "HF_HUB_OFFLINE": "1",
    }


def connect(which: str = "") -> socket.socket:
    start()
    deadline = time.monotonic() + _STARTS
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(os.environ[ADDRESS] + which)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline or any(server.poll() is not None for server in _servers):
                raise
            time.sleep(0.05)


# The server


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def serve(path: str, parent: int, *, build: bool) -> None:
    die_with(parent)
    for name in LIBRARIES:
        importlib.import_module(name)
    if build and os.fork() == 0:
        build_extensions()
    server = os.getpid()
    if os.fork() == 0:
        die_with(server)
        path += BARE
    else:
        for name in PACKAGE:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    connection, _ = listener.accept()
                    open_fork(connection, listener, selector)
                else:
                    close_fork(key, selector)


def build_extensions() -> NoReturn:
    """What DeepSpeed compiles at first use, on a fresh machine for a minute or two: before a test waits for it."""
    os.nice(10)
    try:
        die_with(os.getppid())
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder

        for builder in (ShareMemCommBuilder, CPUAdamBuilder):
            builder().load(verbose=False)
    finally:
        os._exit(0)


def open_fork(connection: socket.socket, listener: socket.socket, selector: selectors.BaseSelector) -> None:
    """Forks the child that a connection asks for; the child sends its number, and the server later its status."""
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = json.loads(receive(connection, struct.unpack("i", head)[0]))
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        become(request, streams, connection, listener, selector, server)
    for stream in streams:
        os.close(stream)
    child = os.pidfd_open(pid)
    selector.register(child, selectors.EVENT_READ, (pid, connection))
    selector.register(connection, selectors.EVENT_READ, (pid, child))


def close_fork(key: selectors.SelectorKey, selector: selectors.BaseSelector) -> None:
    """A child has ended; or the process that asked for it has, which ends the child."""
    pid, other = key.data
    if isinstance(key.fileobj, socket.socket):
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        selector.unregister(key.fileobj)
        return
    _, status = os.waitpid(pid, 0)
    with suppress(OSError):
        other.sendall(struct.pack("i", status))
    with suppress(KeyError):
        selector.unregister(other)
    selector.unregister(key.fileobj)
    os.close(key.fd)
    other.close()


# The child


def become(
    request: dict[str, Any],
    streams: list[int],
    connection: socket.socket,
    listener: socket.socket,
    selector: selectors.BaseSelector,
    server: int,
) -> NoReturn:
    """The process that `python COMMAND` would be."""
    status = 1
    try:
        os.setsid()
        die_with(server)
        # What a fork of a launcher inherits of the server's, and a new interpreter would not.
        for key in list(selector.get_map().values()):
            if key.fileobj is not listener and not isinstance(key.fileobj, int):
                key.fileobj.close()
            elif isinstance(key.fileobj, int):
                os.close(key.fileobj)
        selector.close()
        listener.close()
        for own, given in enumerate(streams):
            os.dup2(given, own)
            os.close(given)
        enter_network(request["process"])
        connection.sendall(struct.pack("i", os.getpid()))
        connection.close()
        for name in request["closed"]:
            os.close(name)
            setattr(sys, ("stdin", "stdout", "stderr")[name], None)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        signal.signal(signal.SIGINT, signal.default_int_handler)
        status = execute(request["command"])
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def enter_network(process: int) -> None:
    """Joins the network namespace of the process that asked for the fork, if it has one of its own."""
    own, asked = (f"/proc/{name}/ns/net" for name in ("self", process))
    if os.readlink(own) != os.readlink(asked):
        with open(asked) as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), 0x40000000) != 0:  # CLONE_NEWNET
                raise OSError(ctypes.get_errno(), f"cannot enter {asked}")


def execute(command: list[str]) -> int:
    """Run what `python` was asked to run, as far as the end of the interpreter; the status that it leaves with."""
    words = list(command)
    if words[0] == "-u":
        words.pop(0)
        sys.stdout.reconfigure(write_through=True)
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [*filter(None, paths), *(path for path in sys.path[1:] if path not in paths)]
    try:
        if words[0] == "-m":
            sys.path[:], sys.argv[:] = [os.getcwd(), *paths], words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.path[:], sys.argv[:] = ["", *paths], ["-c", *words[2:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(words[1], "<string>", "exec"), main.__dict__)
        else:
            sys.path[:], sys.argv[:] = [str(Path(words[0]).resolve().parent), *paths], words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if status and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream, failed in ((sys.stdout, 120), (sys.stderr, status)):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except (OSError, ValueError):
            status = failed
    return status & 0xFF


def ranks_are_forks() -> None:
    """Has a launcher that runs in a fork start its ranks as forks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    def popen(self: Any, args: tuple[str, ...], env: dict[str, str]) -> subprocess.Popen:
        return Forked(args, env=env, stdout=self._stdout, stderr=self._stderr)

    SubprocessHandler._popen = popen


def stand_for(command: list[str]) -> NoReturn:
    """Ends as the fork does that runs `python COMMAND`; Ctrl-C reaches the fork."""
    with Forked([sys.executable, *command]) as fork:
        while True:
            try:
                status = fork.wait()
            except KeyboardInterrupt:
                fork.send_signal(signal.SIGINT)
            else:
                sys.exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "as":
        stand_for(sys.argv[2:])
    if sys.argv[1] == "run":
        start(build=True)
        stand_for(sys.argv[2:])
    ranks_are_forks()
    serve(sys.argv[1], int(sys.argv[2]), build=sys.argv[3:] == ["build"])
