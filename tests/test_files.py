"""Files and folders are replaced atomically."""

import os

import pytest

from rlhf_accel.system import files


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for text in ("one", "zw\u00f6lf\u2028"):
        files.replace_text(path, text)
        assert path.read_bytes().decode("utf-8") == text
    assert [*tmp_path.iterdir()] == [path]


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.replace_text(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.replace_text(path, "new")
    assert path.read_text() == "old"


def test_the_text_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replace"), replace(old, new)))
    files.replace_text(tmp_path / "a", "text")
    assert done == [str(tmp_path / ".a.new"), "replace", str(tmp_path)]


def test_a_work_folder_replaces_its_place_and_touches_no_other_folder(tmp_path):
    place = tmp_path / "git"
    for name in (".git", ".git.work-notes", "git.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").touch()
    for text in ("first", "second"):
        with files.work_folder(place) as work:
            assert work.parent == tmp_path and not [*work.iterdir()]
            (work / "file").write_text(text)
            files.replace_folder(work, place)
        assert (place / "file").read_text() == text
    with pytest.raises(OSError, match="No space"), files.work_folder(place) as work:
        (work / "half").touch()
        raise OSError(28, "No space left on device")
    assert (place / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", ".git.work-notes", "git", "git.old"]
    assert all((tmp_path / name / "kept").exists() for name in (".git", ".git.work-notes", "git.old"))


def test_work_folders_of_killed_processes_are_removed_by_name(tmp_path):
    left = files.name_work_folder(tmp_path / "final")
    for folder in (left, tmp_path / ".final", files.name_work_folder(tmp_path / "best")):
        folder.mkdir()
    files.remove_work_folders(tmp_path, "final")
    assert not left.exists() and (tmp_path / ".final").exists() and len([*tmp_path.iterdir()]) == 2
