"""Serve a reward over HTTP, for `reward.url`: one batch per request, in JSON, by default on this machine only.

    rlhf-accel reward-server --function my_rewards:brevity --port 8000
    rlhf-accel train --config my_run.yaml --reward.url http://127.0.0.1:8000/

A POST of `{"prompts": [...], "responses": [...], "columns": {NAME: [...]}}` is answered with `{"scores": [...]}`, where
a score that is not finite is null, or with `{"error": ...}`. Several requests are read at the same time, each within
--deadline seconds. The reward is called for one after the other, in the main thread. If RLHF_ACCEL_REWARD_TOKEN is
set, requests must carry it.
"""

from __future__ import annotations

import argparse
import hmac
import io
import json
import os
import queue
import socket
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf_accel.commands.parsers import LOOPBACK
from rlhf_accel.config.loading import parse
from rlhf_accel.config.schema import RewardConfig
from rlhf_accel.reward import TOKEN_VARIABLE, Reward, RewardError, load_reward_here
from rlhf_accel.runs.json_lines import finite_or_none
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.system.process import quiet_libraries, tune_process
from rlhf_accel.system.terminal import say


class BadRequest(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RewardServer(ThreadingHTTPServer):
    """Reads and answers several requests at the same time, each in a thread, and calls the reward for one after the
    other in the thread that serves: a function may not be thread-safe, or may need the main thread."""

    daemon_threads = True
    request_queue_size = 1024  # connections that wait for a thread; a full queue would reset further ones

    def __init__(
        self, address: tuple[str, int], reward: Reward, max_bytes: int, *, deadline: float = 30.0, at_once: int = 32
    ) -> None:
        super().__init__(address, _Handler)
        self.reward = reward
        self.max_bytes = max_bytes
        self.deadline = deadline
        self._places = threading.BoundedSemaphore(at_once)
        self._requests: queue.SimpleQueue[tuple[Batch, Future[list[float]]] | None] = queue.SimpleQueue()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        threading.Thread(target=super().serve_forever, args=(poll_interval,), daemon=True).start()
        while (request := self._requests.get()) is not None:
            batch, future = request
            try:
                future.set_result(self.reward(batch.prompts, batch.responses, batch.columns).tolist())
            except Exception as error:
                future.set_exception(error)

    def shutdown(self) -> None:
        self._requests.put(None)
        super().shutdown()

    def scores(self, batch: Batch) -> list[float]:
        """The scores of a batch, when it is its turn. Raises the error of the reward."""
        future: Future[list[float]] = Future()
        self._requests.put((batch, future))
        return future.result()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._places.acquire()  # while none is free, connections wait in the queue
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()


class _Until(io.RawIOBase):
    """Bytes of a socket until a deadline; afterwards `TimeoutError`, even if bytes still arrive."""

    def __init__(self, connection: socket.socket, end: float) -> None:
        self._connection = connection
        self._end = end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request is not complete")
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    server_version, sys_version = "rlhf_accel", ""

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Until(self.connection, time.monotonic() + self.server.deadline))

    def do_POST(self) -> None:
        try:
            batch = read_batch(self._body())
            self._answer(200, {"scores": finite_or_none(self.server.scores(batch))})
        except BadRequest as error:
            self._answer(error.status, {"error": str(error)})
        except RewardError as error:
            self._answer(500, {"error": str(error)})

    def _body(self) -> bytes:
        token = os.environ.get(TOKEN_VARIABLE)
        given = self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            raise BadRequest(401, f"the token is not the one in {TOKEN_VARIABLE}")
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            raise BadRequest(411, "Content-Length is missing or not a length")
        if int(length) > self.server.max_bytes:
            raise BadRequest(413, f"{length} bytes exceed --max_bytes={self.server.max_bytes}")
        try:
            return self.rfile.read(int(length))
        except TimeoutError:
            raise BadRequest(
                408, f"the request was not complete within --deadline={self.server.deadline:g} s"
            ) from None

    def _answer(self, status: int, tree: dict[str, Any]) -> None:
        body = json.dumps(tree).encode()
        self.connection.settimeout(self.server.deadline)  # for the whole answer, even if the client reads slowly
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")  # the body of a refused request was not read
        self.end_headers()
        self.wfile.write(body)


class Batch(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(strict=True, extra="forbid")
    prompts: list[str]
    responses: list[str]
    columns: dict[str, list[Any]] = {}


def read_batch(body: bytes) -> Batch:
    """Raises `BadRequest` for a body that is not JSON, has another form, or has lists of different lengths."""
    try:
        batch = Batch.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        raise BadRequest(400, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}") from None
    if any(len(column) != len(batch.prompts) for column in (batch.responses, *batch.columns.values())):
        raise BadRequest(400, f"responses and columns must have as many items as the {len(batch.prompts)} prompts")
    return batch


def main(options: argparse.Namespace) -> None:
    keys = {key: value for key in RewardConfig.__dataclass_fields__ if (value := getattr(options, key, None))}
    config = parse(RewardConfig, keys)
    tune_process()
    quiet_libraries()
    reward = replace(load_reward_here(config, trust_remote_code=options.trust_remote_code), retries=0)
    try:
        server = RewardServer((options.host, options.port), reward, options.max_bytes, deadline=options.deadline)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host {options.host} --port {options.port}: cannot listen there ({error})", key="--host"
        ) from None
    host, port = server.server_address[:2]
    say(f"reward.url: http://{host!s}:{port}/")
    if options.host not in LOOPBACK and not os.environ.get(TOKEN_VARIABLE):
        say(f"warning: anyone who can reach {options.host} may send requests; set {TOKEN_VARIABLE}", error=True)
    with server:
        server.serve_forever()
