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


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested too deeply"),
        (b'{"step": ' + b"9" * 400 + b"}", "a number with 400 digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b"\xff\xfe", "not JSON"),
        (b'{"half": ', "not JSON"),
        (b" " * 200_001, "more than 200000 bytes"),
    ],
)
def test_a_malformed_json_file_is_refused_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(files.Malformed, match=reason):
        files.read_json(path, 200_000)


@pytest.mark.parametrize("kind", ["device", "pipe", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    """A device may be read without end, and a pipe may have no writer."""
    path = tmp_path / kind
    make = {"device": lambda: path.symlink_to("/dev/zero"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir}
    make[kind]()
    for read in (files.read_bounded, files.read_tail):
        with pytest.raises(files.Malformed, match="not a regular file"):
            read(path, 10)


def test_a_tree_is_bounded_with_its_aliases():
    part = ["x"] * 10
    assert files.bounded([part] * 4, 50) == [part] * 4
    with pytest.raises(files.Malformed, match="more than 50 parts"):
        files.bounded([part] * 5, 50)
    with pytest.raises(files.Malformed, match="too many digits"):
        files.bounded({"a": 10**60})


def test_work_folders_of_killed_processes_are_removed_by_name(tmp_path):
    left = files.name_work_folder(tmp_path / "final")
    for folder in (left, tmp_path / ".final", files.name_work_folder(tmp_path / "best")):
        folder.mkdir()
    files.remove_work_folders(tmp_path, "final")
    assert not left.exists() and (tmp_path / ".final").exists() and len([*tmp_path.iterdir()]) == 2
