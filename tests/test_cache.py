"""The cache of models: each folder is built once, and is complete or absent."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest

from rlhf_accel.data.cache import built_once, cache_dir
from rlhf_accel.system.errors import ConfigError


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_ACCEL_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("RLHF_ACCEL_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "rlhf_accel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "rlhf_accel"


def build(folder: Path) -> None:
    """In a process of its own: builds unless another process has, and leaves a file with its id."""
    with built_once(folder, "key", 1) as work:
        if work is not None:
            (work / "result").mkdir()
            for i in range(200):
                (work / "result" / str(i)).write_text("done")
            (folder.parent / f"built-by-{os.getpid()}").touch()


def test_two_processes_at_once_build_once(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build, args=(tmp_path / "thing",)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "thing").iterdir())) == 200
    assert len(list(tmp_path.glob("built-by-*"))) == 1


def hang(folder: Path) -> None:
    with built_once(folder, "key", 1) as work:
        assert work is not None
        (work / "result").mkdir()
        (work / "result" / "half").touch()
        time.sleep(60)


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path):
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=hang, args=(tmp_path / "thing",))
    killed.start()
    while not list(tmp_path.glob(".thing.work-*/result/half")):
        assert killed.is_alive()
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert not (tmp_path / "thing").exists()
    build(tmp_path / "thing")
    assert len(list((tmp_path / "thing").iterdir())) == 200
    assert not list(tmp_path.glob(".thing.work-*"))


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), built_once(tmp_path / "thing", "key", 1) as work:
        (work / "result").mkdir()
        _ = 1 / 0
    assert not (tmp_path / "thing").exists()
    assert not list(tmp_path.glob(".thing.work-*"))


def test_no_room_and_no_right_to_write_are_errors(tmp_path, monkeypatch):
    def attempt(folder: Path) -> None:
        with built_once(folder, "reward.model", 100) as work:
            (work / "result").mkdir()

    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"reward\.model: cannot write .*RLHF_ACCEL_CACHE"):
        attempt(tmp_path / "file" / "thing")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=99 * 10**6))
    with pytest.raises(ConfigError, match=r"has 99 MB free and needs 100 MB; .*RLHF_ACCEL_CACHE"):
        attempt(tmp_path / "thing")
