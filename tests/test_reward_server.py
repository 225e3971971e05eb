"""reward.url and the reference server: the right scores, and nothing but the contract on either side."""

from __future__ import annotations

import http.server
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch

from rlhf_accel.commands.reward_server import RewardServer
from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.schema import Config, RewardConfig
from rlhf_accel.reward import TOKEN_VARIABLE, RemoteReward, Reward, RewardError, load_reward, weighted
from rlhf_accel.system.errors import ConfigError
from rlhf_accel.training.ppo_trainer import PPOTrainer
from tests.conftest import share_of_o

pytestmark = pytest.mark.usefixtures("exact_fp32")


def number_of(prompts: list[str], responses: list[str], number: list[float], **columns: Any) -> list[float]:
    return [float(n) for n in number]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """A function that serves a reward and returns its address."""
    servers = []

    def start(function: Callable[..., Any], max_bytes: int = 10_000, **settings: Any) -> str:
        reward = Reward(terms=(("served", 1.0, function),))
        server = RewardServer(("127.0.0.1", 0), reward, max_bytes, **settings)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def answering() -> Iterator[Callable[..., str]]:
    """A function that serves these bytes to whoever posts anything, with a status and headers."""
    servers = []

    def start(body: bytes, status: int = 200, seconds: float = 0.0, **headers: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                done.wait(seconds)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        done = threading.Event()
        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append((server, done))
        return f"http://127.0.0.1:{server.server_address[1]}/score"

    yield start
    for server, done in servers:
        done.set()
        server.shutdown()
        server.server_close()


def remote(url: str, **settings: Any) -> Reward:
    return load_reward(parse(RewardConfig, {"url": url, "retries": 0, **settings}), None, None)  # type: ignore[arg-type]


def test_scores_cross_the_wire(serve) -> None:
    reward = remote(serve(number_of))
    scores = reward(["a", "ü\u2028"], ["b", "\x00\U0001f600"], {"number": [0.5, -2]})
    assert scores.tolist() == [0.5, -2.0]


def test_a_run_learns_from_a_server_what_it_learns_from_the_function(serve, tiny, tmp_path) -> None:
    rows = []
    for name, reward in (("remote", {"function": [], "url": serve(share_of_o, 100_000)}), ("local", {})):
        folder = tmp_path / name
        PPOTrainer(tiny(run={"output_dir": str(folder)}, reward=reward)).fit()
        rows.append([json.loads(line)["objective/score"] for line in (folder / "metrics.jsonl").open()])
    assert rows[0] == rows[1]


def test_a_sum_of_all_three_kinds(serve, classifier_folder) -> None:
    tree = {"model": str(classifier_folder), "label": "1", "url": serve(number_of), "weights": [0.0, 2.0, 10.0]}
    config = parse(RewardConfig, {**tree, "function": "tests.conftest:share_of_o"})
    import torch

    reward = load_reward(config, str(classifier_folder), torch.device("cpu"))
    assert reward(["a"], ["of"], {"number": [3.0]}).tolist() == [2 * 3.0 + 10 * 0.5]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "body"),
        (b"[]", 400, "body"),
        (b"{", 400, "body"),
        (b"[" * 9_000, 400, "body"),
        (b"\xff\xfe", 400, "body"),
        (b'{"prompts": ["a"]}', 400, "responses: Field required"),
        (b'{"prompts": ["a"], "responses": ["b", "c"]}', 400, "as many items as the 1 prompts"),
        (b'{"prompts": ["a"], "responses": ["b"], "columns": {"number": [1, 2]}}', 400, "as many items as"),
        (b'{"prompts": ["a"], "responses": [1]}', 400, "responses.0"),
        (b'{"prompts": "a", "responses": "b"}', 400, "prompts"),
        (b'{"prompts": ["a"], "responses": ["b"], "pickle": "x"}', 400, "pickle: Extra"),
        (b'{"prompts": ["a"], "responses": ["b"]}', 500, "number"),
        (b" " * 10_001, 413, "max_bytes=10000"),
    ],
)
def test_the_server_answers_bad_requests(serve, body: bytes, status: int, said: str) -> None:
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(serve(number_of), body))
    assert refused.value.code == status
    assert said in json.loads(refused.value.read())["error"]


def test_a_score_that_is_not_finite_crosses_the_wire(serve) -> None:
    """For the trainer to skip, as that of a function is."""
    scores = remote(serve(number_of))(["a", "b"], ["c", "d"], {"number": ["nan", 1.0]})
    assert scores.isnan().tolist() == [True, False]


@pytest.mark.parametrize("length", ["", "Content-Length: -1\r\n", "Content-Length: " + "1" * 5000 + "\r\n"])
def test_the_server_reads_no_body_without_a_length(serve, length: str) -> None:
    with socket.create_connection(("127.0.0.1", int(serve(number_of).split(":")[2][:-1]))) as client:
        client.sendall(f"POST / HTTP/1.1\r\nHost: here\r\n{length}\r\n".encode())
        assert b"411" in client.recv(1000)


BODY = b'{"prompts": ["a"], "responses": ["b"], "columns": {"number": [1.0]}}'
HEAD = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(BODY)


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.split(":")[2].partition("/")[0])), timeout=20)


def drip(connection: socket.socket, data: bytes) -> None:
    """A byte now and then, so that no single read waits long."""
    with suppress(OSError):
        for i in range(len(data)):
            connection.sendall(data[i : i + 1])
            time.sleep(0.05)


def dripping(connection: socket.socket, count: int) -> threading.Thread:
    """Sends `count` bytes, one in 0.05 s."""
    thread = threading.Thread(target=drip, args=(connection, b"POST " + b"x" * (count - 5)), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("begun", [b"", HEAD], ids=["headers", "body"])
def test_one_who_drips_bytes_blocks_nobody(serve, begun: bytes) -> None:
    url = serve(number_of, deadline=60)
    with connect(url) as slow:
        slow.sendall(begun)
        thread = dripping(slow, 200)
        assert remote(url)(["a"], ["b"], {"number": [1.0]}).tolist() == [1.0]
        assert thread.is_alive()


@pytest.mark.parametrize(("begun", "answer"), [(b"", b""), (HEAD, b"408")], ids=["headers", "body"])
def test_one_who_drips_bytes_is_cut_off(serve, begun: bytes, answer: bytes) -> None:
    with connect(serve(number_of, deadline=0.6)) as slow:
        slow.sendall(begun)
        start = time.perf_counter()
        dripping(slow, 200)  # for 10 s
        with suppress(ConnectionResetError):
            assert answer in slow.recv(1000)
        assert time.perf_counter() - start < 8


def test_many_clients_at_once_are_all_answered_one_after_the_other(serve) -> None:
    """None is reset, and the reward is called in one thread: as if it were alone."""
    threads, at_work = set(), []

    def counts(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
        threads.add(threading.current_thread())
        at_work.append(1)
        assert len(at_work) == 1
        time.sleep(0.001)
        at_work.pop()
        return number_of(prompts, responses, **columns)

    url = serve(counts, at_once=8)
    clients = [connect(url) for _ in range(200)]  # 8 are read, the others wait
    for client in clients:
        client.sendall(HEAD + BODY)
    answers = []
    for client in clients:
        with client, client.makefile("rb") as answer:
            answers.append(answer.read().rpartition(b"\r\n\r\n")[2])
    assert answers == [b'{"scores": [1.0]}'] * 200
    assert len(threads) == 1


def test_a_token_is_asked_for_and_sent(serve, monkeypatch) -> None:
    url = serve(number_of)
    monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
    assert remote(url)(["a"], ["b"], {"number": [1.0]}).tolist() == [1.0]
    with pytest.raises(HTTPError) as refused:
        urlopen(Request(url, b"{}", {"Authorization": "Bearer other"}))
    assert refused.value.code == 401


@pytest.mark.parametrize("token", ["hunter2\r", "hunter2 ", "hünter2"])
def test_a_token_that_cannot_be_sent_is_refused_and_not_repeated(token: str, monkeypatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as refused:
        remote("http://127.0.0.1:9/")
    assert "nter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"no json", "JSONDecodeError"),
        (b"[1.0]", "TypeError"),
        (b'{"score": [1.0]}', "KeyError: 'scores'"),
        (b'{"scores": 1.0}', 'expected {"scores": [number, …]}'),
        (b'{"scores": ["1.0"]}', "expected"),
        (b'{"scores": [true]}', "expected"),
        (b'{"scores": ["nan"]}', "expected"),
        (b'{"scores": [1' + b"0" * 400 + b"]}", "returned [1000"),
        (b'{"scores": [1.0, 2.0]}', "returned 2 scores for 1 responses"),
        (b'{"scores": []}', "returned 0 scores for 1 responses"),
    ],
)
def test_answers_that_are_none(answering, body: bytes, said: str) -> None:
    url = answering(body)
    with pytest.raises(RewardError) as failed:
        remote(url)(["a"], ["b"], {})
    assert str(failed.value).startswith(f"reward.url={url} ")
    assert said in str(failed.value)


def test_an_answer_without_end_is_not_read(answering, monkeypatch) -> None:
    monkeypatch.setattr("rlhf_accel.reward.server.LARGEST_ANSWER", 1 << 20)
    with pytest.raises(RewardError, match="more than 1 MiB"):
        remote(answering(b'{"scores": [1' + b"0" * (1 << 20) + b"]}"))(["a"], ["b"], {})


def test_a_redirection_is_not_followed(answering, serve, monkeypatch) -> None:
    """It would carry the token to somebody else."""
    monkeypatch.setenv(TOKEN_VARIABLE, "sesame")
    with pytest.raises(RewardError, match="the server answered 307"):
        remote(answering(b"", 307, Location=serve(number_of)))(["a"], ["b"], {"number": [1.0]})


def test_a_server_that_does_not_answer(answering) -> None:
    with pytest.raises(RewardError, match=r"timed out|TimeoutError"):
        remote(answering(b"", seconds=20.0), timeout=0.2)(["a"], ["b"], {})


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n"], ids=["headers", "body"])
def test_a_server_that_drips_bytes_has_as_long_as_any_other(begun: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answers() -> None:
            connection, _ = server.accept()
            connection.sendall(begun)
            drip(connection, b"x" * 100)

        threading.Thread(target=answers, daemon=True).start()
        start = time.perf_counter()
        with pytest.raises(TimeoutError, match=r"no answer within reward\.timeout=0\.3 s"):
            RemoteReward(f"http://127.0.0.1:{server.getsockname()[1]}/", 0.3)(["a"], ["b"])
        assert time.perf_counter() - start < 4  # of 5
    assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())


def test_nobody_listens(caplog) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and listens not
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        with caplog.at_level(logging.WARNING), pytest.raises(RewardError, match="Connection refused"):
            remote(url, retries=2, retry_wait=0.01)(["a"], ["b"], {})
    assert [record.getMessage().rpartition("; ")[2] for record in caplog.records] == [
        "trying again in 0.01 s (1 of 2)",
        "trying again in 0.02 s (2 of 2)",
    ]


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "file:///etc/passwd", "ftp://host/", "http://", "http://host:99999/", "http://[::1", "", "x y"],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.url is not an address; expected http://HOST:PORT/PATH"):
        load(Config, None, ["--reward.url", f"'{url}'"])


@pytest.mark.parametrize("url", ["http://me:hunter2@host/", "https://host/?key=hunter2", "https://hunter2@host/"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match=TOKEN_VARIABLE) as refused:
        load(Config, None, ["--reward.url", url])
    assert "hunter2" not in str(refused.value)


# Patience


def failing(times: int, error: Exception) -> Callable[..., list[float]]:
    left = [error] * times

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        if left:
            raise left.pop()
        return [1.0] * len(prompts)

    return reward


def test_a_function_that_fails_is_tried_again_with_longer_waits(monkeypatch, caplog) -> None:
    waits: list[float] = []
    monkeypatch.setattr(weighted.time, "sleep", waits.append)
    patient = {"retries": 3, "retry_wait": 0.5}
    assert Reward(terms=(("f", 1.0, failing(3, OSError("gone"))),), **patient)(["a"], ["b"], {}).tolist() == [1.0]
    assert waits == [0.5, 1.0, 2.0]
    with pytest.raises(RewardError, match="f raised OSError: gone"):
        Reward(terms=(("f", 1.0, failing(4, OSError("gone"))),), **patient)(["a"], ["b"], {})
    assert len(waits) == 6


def leaves(prompts: list[str], responses: list[str]) -> list[float]:
    raise SystemExit(0)


def test_a_function_that_leaves_is_one_that_fails() -> None:
    with pytest.raises(RewardError, match="f raised SystemExit: 0"):
        Reward(terms=(("f", 1.0, leaves),))(["a"], ["b"], {})


def test_patience_has_to_end_before_that_of_the_other_processes() -> None:
    with pytest.raises(
        ConfigError, match=r"^reward\.timeout=1800 .* may take 5403 s, .*run\.collective_timeout=3600 s"
    ):
        load(Config, None, ["--reward.timeout", "1800"])


def test_a_function_that_takes_too_long() -> None:
    done = threading.Event()

    def sleeps(prompts: list[str], responses: list[str]) -> list[float]:
        done.wait(20)
        return [1.0]

    with pytest.raises(RewardError, match=r"f raised TimeoutError: no answer within reward\.timeout=0\.1 s"):
        Reward(terms=(("f", 1.0, sleeps),), timeout=0.1)(["a"], ["b"], {})
    done.set()
    assert Reward(terms=(("f", 1.0, sleeps),), timeout=20.0)(["a"], ["b"], {}).tolist() == [1.0]


def test_a_function_with_a_timeout_has_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread begins with GPU 0."""
    chosen = threading.local()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(chosen, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: setattr(chosen, "gpu", gpu))
    torch.cuda.set_device(3)

    def gpu(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(torch.cuda.current_device())]

    for timeout in (None, 20.0):
        assert Reward(terms=(("f", 1.0, gpu),), timeout=timeout)(["a"], ["b"], {}).tolist() == [3.0]
