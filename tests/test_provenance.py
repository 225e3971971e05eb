"""The recorded environment of a run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch

from rlhf_accel import __version__
from rlhf_accel.system import provenance


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with one commit of one file."""
    (tmp_path / "code.py").write_text("", encoding="utf-8")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        settings = ["-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *command], check=True)
    return tmp_path


def test_versions_machine_and_processes_are_named() -> None:
    facts = provenance.environment(3, torch.device("cpu"))
    assert (facts["processes"], facts["device"]) == (3, "cpu")
    assert facts["versions"]["rlhf_accel"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["machine"]["cpu"]
    assert facts["machine"]["cores"] == os.cpu_count()
    assert facts["machine"]["memory_gib"] > 0
    assert "gpu" not in facts["machine"]


def test_a_package_that_is_not_installed_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("torch", "no-such-package"))
    assert provenance.environment(1, torch.device("cpu"))["versions"].keys() == {"rlhf_accel", "python", "torch"}


def test_the_commit_is_that_of_the_checkout_and_marks_changes(checkout: Path) -> None:
    commit = provenance._commit(checkout)
    assert commit is not None and len(commit) == 40 and int(commit, 16)
    (checkout / "notes.txt").write_text("not tracked", encoding="utf-8")
    assert provenance._commit(checkout) == commit
    (checkout / "code.py").write_text("changed = True\n", encoding="utf-8")
    assert provenance._commit(checkout) == f"{commit}, changed"


def test_an_installed_package_has_no_commit_of_the_repository_around_it(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    assert provenance._commit(checkout / "site-packages") is None


def test_there_is_no_commit_if_git_is_missing_or_hangs(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path_factory.mktemp("tools")
    monkeypatch.setenv("PATH", str(tools))
    assert provenance._commit(checkout) is None
    git = tools / "git"
    git.write_text("#!/bin/sh\nexec /bin/sleep 60\n", encoding="utf-8")
    git.chmod(0o755)
    monkeypatch.setattr(provenance, "_TIMEOUT", 0.2)
    assert provenance._commit(checkout) is None
