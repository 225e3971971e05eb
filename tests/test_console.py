"""A console that fails does not end a run; a command that prints its result there ends with one line."""

import io
import json
import subprocess
import sys

import pytest
import yaml

from rlhf_accel.runs.progress_line import ProgressLine
from rlhf_accel.system import console
from rlhf_accel.system.errors import RunFailed
from tests import forks
from tests.distributed.conftest import tree
from tests.distributed.launch import ROOT, environment


class Fails(io.StringIO):
    encoding = "utf-8"

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def write(self, text):
        self.calls += 1
        raise self.error

    flush = write


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe"), ValueError("closed")]
)
def test_a_stream_that_fails_discards_the_rest_and_a_strict_one_raises(error):
    broken = Fails(error)
    stream = console.Stream(lambda: broken)
    for _ in range(3):
        assert stream.write("text") == 4
    assert (stream.given_up, broken.calls) == (True, 1)
    with pytest.raises(
        RunFailed, match=rf"^standard output cannot be written \({getattr(error, 'strerror', error)}\)$"
    ):
        console.Stream(lambda: broken, strict=True).write("text")
    with pytest.raises(RunFailed, match="the process has none"):
        console.Stream(lambda: None, strict=True).write("text")
    assert console.Stream(lambda: None).write("text") == 4


def test_characters_that_the_encoding_lacks_become_question_marks():
    raw = io.BytesIO()
    stream = console.Stream(lambda: latin, strict=True)
    latin = io.TextIOWrapper(raw, encoding="latin-1")
    stream.write("naïve 😀 贪官\n")
    stream.flush()
    assert raw.getvalue().decode("latin-1") == "naïve ? ??\n"


def test_a_progress_line_survives_its_console(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Fails(BrokenPipeError(32, "Broken pipe")))
    with ProgressLine(3, enabled=True) as line:
        line.say("text")
        line.table("samples", [{"a": 1.0, "b": "😀"}])
        line.advance(1, "text")


def run(command, **streams):
    with forks.Forked([sys.executable, *command], cwd=ROOT, env=environment(), text=True, **streams) as process:
        _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def test_a_command_that_prints_its_result_fails_in_one_line():
    with open("/dev/full", "w") as full:
        for streams, reason in (
            ({"stdout": full}, "No space left on device"),
            ({"closed": [1]}, "the process has none"),
        ):
            done = run(["-m", "rlhf_accel", "train", "--print_config"], stderr=subprocess.PIPE, **streams)
            assert done == (1, f"error: standard output cannot be written ({reason})\n")


def test_a_run_without_a_console_finishes(gpt2_folder, prompts_file, tmp_path):
    settings = tree(gpt2_folder, prompts_file, {"run": {"total_steps": 2, "eval_samples": 2, "sample_every": 1}})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    folder = tmp_path / "run"
    command = ["-m", "rlhf_accel", "train", "--config", tmp_path / "config.yaml", "--run.output_dir", folder]
    with open("/dev/full", "w") as full:
        assert run(command, stdout=full, closed=[2])[0] == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]  # and no text of a console
    assert (folder / "summary.json").exists()
