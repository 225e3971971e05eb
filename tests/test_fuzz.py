"""Malformed files in a run's folder, and malformed configs: one line each, and in a bounded time.

Seeded, in one process. The long form, `-m long`, has more cases and draws the charts.
"""

import json
import os
import random
import shutil
import signal
import time
import traceback
from contextlib import contextmanager

import pytest
import yaml

from rlhf_accel.algorithm.advantages import make_experience
from rlhf_accel.commands import evaluate, generate, merge, parsers, push, replay, report
from rlhf_accel.commands.checks.config_checks import read
from rlhf_accel.commands.checks.findings import Findings
from rlhf_accel.config.loading import load, parse
from rlhf_accel.config.schema import Config
from rlhf_accel.runs import checkpoint, hub
from rlhf_accel.runs.report import charts
from rlhf_accel.system.errors import ConfigError, RunFailed
from rlhf_accel.training.ppo_trainer import PPOTrainer
from rlhf_accel.training.run import Run

SECONDS = 10
SHORT = 50  # cases of the short form
DEEP = "[" * 100_000
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CONTENTS = [
    *(
        b"",
        b"\0",
        b"{",
        b"null",
        b"[]",
        b"{}",
        b"0",
        b'"text"',
        b"\xff\xfe\xfd",
        b"[{}]",
        b"- 1\n- 2\n",
        b"a: *a",
        b"{" * 9999,
    ),
    *(DEEP.encode(), (DEEP + "]" * len(DEEP)).encode(), b"9" * 400, b"9" * 9999, b'{"step": ' + b"9" * 400 + b"}"),
    *(
        BOMB.encode(),
        b"a: &a [*a]",
        b"<<: {a: 1}\n? [1]\n: 2\n",
        b'{"step": 1e999}',
        b'"\\ud800"',
        b"!!python/object:os.system {}",
    ),
    *(b'{"a":' * 400 + b"1" + b"}" * 400, b"\xef\xbb\xbf{}", b'{"steps": 2, "steps": 3}'),
]
VALUES = [
    *(None, True, -1, 0, 10**39, 10**399, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "../../../etc/passwd"),
    *("/dev/zero", [], {}, [[]], [None], {"a": {"b": [1]}}, ["x"] * 50, [{"step": "x"}], {"": 0}, "a\nb\0c", 2**63),
]


@contextmanager
def in_time():
    """Fails after so many seconds of CPU time, or ten times as many by the clock, since the machine may be busy."""

    def late(*_):
        raise AssertionError(f"more than {SECONDS} s")

    timers = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 10 * SECONDS))
    before = [signal.signal(number, late) for number, _, _ in timers]
    for _, timer, seconds in timers:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def outcome(command, *arguments):
    """The one-line message of its error, or "" if it succeeds."""
    with in_time():
        try:
            command(*arguments)
        except (ConfigError, RunFailed) as error:
            assert len(str(error).splitlines()) == 1
            assert len(str(error)) < 5000
            return str(error)
        except SystemExit as left:
            assert left.code in (0, 2), left.code
    return ""


@pytest.fixture(scope="module")
def a_run(gpt2_folder, prompts_file, tmp_path_factory):
    """A run with every file that a run may have."""
    folder = tmp_path_factory.mktemp("fuzz") / "run"
    config = parse(
        Config,
        {
            "run": {
                **{
                    "output_dir": str(folder),
                    "total_steps": 2,
                    "save_every": 1,
                    "keep_checkpoints": 1,
                    "eval_every": 1,
                    "eval_samples": 2,
                },
                **{"trackers": [], "report": False, "sample_every": 1, "precision": "fp32"},
            },
            "model": {"name_or_path": str(gpt2_folder), "dtype": "fp32"},
            "lora": {"r": 2},
            "data": {"source": str(prompts_file), "prompt_tokens": [2, 6]},
            "rollout": {"batch_size": 4, "max_prompt_tokens": 6, "max_new_tokens": 4},
            "reward": {"function": "tests.conftest:share_of_o"},
        },
    )
    trainer = PPOTrainer(config)
    trainer.fit()
    rollout, facts = trainer.rollout, {"message": "m", "rows": [0, 2]}
    facts |= {"prompts": rollout.prompts, "responses": rollout.texts, "columns": {"number": [1, 2, 3, 4]}}
    trainer.run.recorder.dump({**facts, "step": 1, "phase": "score"}, None)
    experience = make_experience(rollout, config.ppo, config.reward, 0.05)
    trainer.run.recorder.dump({**facts, "step": 2, "phase": "update"}, experience)
    evaluate.main(parsers.evaluate([str(folder), "--which", "final", "--frontier", "2", "--trust_code"]))
    return folder


def commands(folder, path, rng):
    """A command that reads a run's folder, with its arguments."""
    run = str(folder)

    def resume():
        options = ["--run.output_dir", run, "--run.resume", rng.choice(["latest", "auto"]), "--run.total_steps", "3"]
        PPOTrainer(load(Config, folder / "config.yaml", options)).fit()

    return {
        "report": lambda: report.main(parsers.report([run, "--output", str(folder / "page.html")])),
        "evaluate": lambda: evaluate.main(parsers.evaluate([run, "--which", "final", "--trust_code"])),
        "generate": lambda: generate.main(
            parsers.generate([run, "The film", "--max_new_tokens", "2", "--trust_code", "--score"])
        ),
        "merge": lambda: merge.main(parsers.merge([run, str(folder / "merged")])),
        "push": lambda: push.main(parsers.push([run, "me/mine", "--base", "org/base"])),
        "replay": lambda: replay.main(parsers.replay([str(path.parent), "--trust_code"])),
        "resume": resume,
    }


READ_BY = {
    "config.yaml": ["report", "evaluate", "generate", "merge", "push", "resume"],
    "metrics.jsonl": ["report", "evaluate", "resume"],
    "samples.jsonl": ["report", "resume"],
    "summary.json": ["report", "evaluate", "generate", "resume"],
    "evaluation.json": ["report"],
    "frontier.json": ["report"],
    "environment.json": ["report"],
    "final": ["generate", "merge", "push", "evaluate"],
    "checkpoints": ["resume"],
    "dumps": ["replay"],
}


def damaged(path, rng):
    """Damage a file; returns a description."""
    how = rng.choice(["content", "content", "value", "value", "value", "value", "cut", "flip", "kind"])
    whole = path.read_bytes()
    if how == "value" and path.suffix in (".json", ".jsonl", ".yaml"):
        return how, _other_value(path, whole, rng)
    if how == "kind":
        kind = rng.choice(["absent", "folder", "pipe", "zero", "circle", "twice"])
        path.unlink()
        {
            "absent": lambda: None,
            "folder": path.mkdir,
            "pipe": lambda: os.mkfifo(path),
            "zero": lambda: path.symlink_to("/dev/zero"),
            "circle": lambda: path.symlink_to(path),
            "twice": lambda: path.write_bytes(whole * 2),
        }[kind]()
        return how, kind
    content = rng.choice(CONTENTS)
    if how == "cut":
        content = whole[: rng.randrange(len(whole) + 1)]
    elif how == "flip" and whole:
        place = rng.randrange(len(whole))
        content = whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]
    path.write_bytes(content)
    return how, content[:80]


def _other_value(path, whole, rng):
    """Change or remove a value somewhere in a tree; the digest of a manifest is updated."""
    text = whole.decode()
    rows = [json.loads(line) for line in text.split("\n") if line] if path.suffix == ".jsonl" else []
    tree = rng.choice(rows) if rows else yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    place, keys = tree, []
    while isinstance(place, (dict, list)) and place:
        key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
        keys.append(key)
        parent, place = place, place[key]
        if rng.random() < 0.3:
            break
    value = rng.choice(VALUES)
    if not keys:
        return None
    if rng.random() < 0.15:
        del parent[key]
    else:
        parent[key] = value
    if path.name == checkpoint.MANIFEST:
        tree.pop("sha256", None)
        tree["sha256"] = checkpoint._digest(tree)
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogateescape")
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows or [tree]) + "\n", encoding="utf-8")
    return keys, value


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize("count", [SHORT, pytest.param(3000, marks=pytest.mark.long)], ids=["short", "long"])
def test_malformed_files_in_a_runs_folder(count, a_run, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "check_access", lambda *_: None)
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: "address")
    monkeypatch.setattr(hub.HfApi, "upload_folder", lambda *_, **__: None)
    monkeypatch.setattr(Run, "_train", lambda self: {})
    if count == SHORT:
        monkeypatch.setattr(charts, "png", lambda *_: None)
        monkeypatch.setattr(charts, "svg", lambda *_: "")
        monkeypatch.setattr(charts, "draw", lambda chart: chart)
    rng, spent, found = random.Random(1), {}, []
    for number in range(count):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(a_run, folder)
        part = rng.choice(list(READ_BY))
        paths = [folder / part, *sorted((folder / part).rglob("*"))]
        path = rng.choice([path for path in paths if path.is_file()])
        case = (number, path.relative_to(folder), *damaged(path, rng))
        name = rng.choice(READ_BY[part])
        start = time.process_time()
        try:
            outcome(commands(folder, path, rng)[name])
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            found.append(f"{name} of {case}: {type(error).__name__}: {error!s:.200} ({frame.name}:{frame.lineno})")
        spent[name] = spent.get(name, 0) + time.process_time() - start
    print({name: round(seconds, 1) for name, seconds in spent.items()})
    assert not found, "\n".join([f"{len(found)} of {count}", *found[:20]])


@pytest.mark.parametrize("count", [SHORT, pytest.param(5000, marks=pytest.mark.long)], ids=["short", "long"])
def test_malformed_configs(count, a_run, tmp_path):
    rng, path, refused = random.Random(2), tmp_path / "config.yaml", 0
    for number in range(count):
        shutil.copy(a_run / "config.yaml", path)
        case = (number, *damaged(path, rng))
        try:
            refused += outcome(load, Config, path) != ""
            outcome(read, Findings(lambda line: None), path)
        except Exception as error:
            raise AssertionError(f"{case}: {type(error).__name__}: {error}") from error
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
    assert refused > count / 3
