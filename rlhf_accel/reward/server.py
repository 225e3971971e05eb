"""Scores from a server over HTTP: the other end of `reward.url`, with a token and a limit on time and size.

Knows the protocol, which `commands/reward_server.py` serves; knows no model.
"""

from __future__ import annotations

import json
import math
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

from rlhf_accel.system.errors import ConfigError

TOKEN_VARIABLE = "RLHF_ACCEL_REWARD_TOKEN"
LARGEST_ANSWER = 64 << 20  # bytes; a million scores fit many times


class RemoteReward:
    """Scores from the server at `url`, within `timeout` seconds for each call.

    The token in RLHF_ACCEL_REWARD_TOKEN, if set, is sent to this address only: redirections are not followed.
    """

    def __init__(self, url: str, timeout: float | None) -> None:
        self.url = url
        self.timeout = timeout or 60.0
        self._token = os.environ.get(TOKEN_VARIABLE, "")
        if not all("!" <= character <= "~" for character in self._token):
            raise ConfigError(
                f"{TOKEN_VARIABLE} contains white space or characters outside ASCII; check how it was set",
                key=TOKEN_VARIABLE,
            )
        loopback = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
        # A proxy named in the environment cannot reach this machine's loopback.
        self._handlers: tuple[Any, ...] = (_NoRedirection, *([ProxyHandler({})] if loopback else []))

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        body = json.dumps({"prompts": list(prompts), "responses": list(responses), "columns": columns}, default=str)
        headers = {"Content-Type": "application/json"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        text = self._answer(Request(self.url, body.encode(), headers))
        if len(text) > LARGEST_ANSWER:
            raise ValueError(f"the answer has more than {LARGEST_ANSWER >> 20} MiB")
        scores = json.loads(text)["scores"]
        if not isinstance(scores, list) or not all(score is None or type(score) in (int, float) for score in scores):
            raise TypeError('expected {"scores": [number, …]}, null for one that is not finite')
        return [math.nan if score is None else score for score in scores]

    def _answer(self, request: Request) -> bytes:
        """The whole answer of the server, within the timeout; urllib's own timeout holds for each read."""
        sockets: list[socket.socket] = []
        late = threading.Event()

        def cut() -> None:
            late.set()
            for connection in sockets:
                with suppress(OSError):  # already closed
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

        timer = threading.Timer(self.timeout, cut)
        timer.daemon = True
        timer.start()
        opener = build_opener(_Http(sockets), _Https(sockets), *self._handlers)
        try:
            try:
                with opener.open(request, timeout=self.timeout) as answer:
                    text: bytes = answer.read(LARGEST_ANSWER + 1)
            except HTTPError as error:
                message = " ".join(error.read(200).decode(errors="replace").split())
                raise RuntimeError(f"the server answered {error.code} {error.reason} ({message})") from None
            except URLError as error:
                raise ConnectionError(f"{error.reason}; is the server running?") from None
        except (OSError, HTTPException, RuntimeError):
            if not late.is_set():
                raise
        finally:
            timer.cancel()
            timer.join()  # `cut` may be at work: no thread is left behind
        if late.is_set():
            raise TimeoutError(f"no answer within reward.timeout={self.timeout:g} s")
        return text


class _Http(HTTPHandler):
    """Keeps a list of the sockets that it opens."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        super().__init__()
        self._sockets = sockets

    def http_open(self, request: Request) -> Any:
        return self.do_open(_listed(HTTPConnection, self._sockets), request)


class _Https(HTTPSHandler):
    def __init__(self, sockets: list[socket.socket]) -> None:
        super().__init__()
        self._sockets = sockets

    def https_open(self, request: Request) -> Any:
        return self.do_open(_listed(HTTPSConnection, self._sockets), request)


def _listed(kind: Any, sockets: list[socket.socket]) -> Any:
    class Connection(kind):  # type: ignore[misc]  # one of two classes
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    return Connection


class _NoRedirection(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None
