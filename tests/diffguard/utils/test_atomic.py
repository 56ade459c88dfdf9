"""Folders that are there whole or not at all."""

import pytest

import diffguard.utils.atomic
from diffguard.errors import DataError
from diffguard.models.denoisers.loading import load_denoiser, save_denoiser
from diffguard.utils.atomic import atomic_folder


def write(folder, text):
    with atomic_folder(folder) as new:
        (new / "file.txt").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left_beside_it(tmp_path, monkeypatch, at_once):
    if not at_once:  # a system that cannot exchange two folders
        monkeypatch.setattr(diffguard.utils.atomic.ctypes, "CDLL", lambda *_, **__: object())
    folder = tmp_path / "deep" / "folder"
    for text in ("first", "second"):
        write(folder, text)
        assert (folder / "file.txt").read_text() == text
        assert folder.stat().st_mode & 0o777 == 0o755
        assert names(folder.parent) == ["folder"]


def test_an_error_leaves_what_was_there(tmp_path):
    write(tmp_path / "folder", "first")
    for folder in (tmp_path / "folder", tmp_path / "other"):
        with pytest.raises(TypeError):
            write(folder, 0)
    assert names(tmp_path) == ["folder"]
    assert (tmp_path / "folder" / "file.txt").read_text() == "first"


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "folder", "first")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "folder")
    write(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere" / "folder" / "file.txt").read_text() == "second"
    assert (names(tmp_path), names(tmp_path / "elsewhere")) == (["elsewhere", "link"], ["folder"])


def test_a_file_is_not_replaced(tmp_path):
    (tmp_path / "notes").write_text("kept")
    with pytest.raises(NotADirectoryError):
        write(tmp_path / "notes", "lost")
    assert (tmp_path / "notes").read_text() == "kept"
    assert names(tmp_path) == ["notes"]


def test_a_denoiser_replaces_nothing(denoiser, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"0")
    (tmp_path / "notes").write_text("kept")
    for name in ("photos", "notes"):
        with pytest.raises(DataError, match=f"{name}: there is something already; move it, or name another folder"):
            save_denoiser(denoiser, tmp_path / name)
    assert (names(tmp_path), names(tmp_path / "photos")) == (["notes", "photos"], ["cat.jpg"])
    (tmp_path / "empty").mkdir()
    save_denoiser(denoiser, tmp_path / "empty")
    assert load_denoiser(tmp_path / "empty").image_shape == denoiser.image_shape


def test_another_user_may_read_every_file(tmp_path):
    with atomic_folder(tmp_path / "folder") as new:
        (new / "deep").mkdir()
        (new / "deep" / "weights.safetensors").touch(mode=0o600)  # as safetensors makes it
    assert (tmp_path / "folder" / "deep" / "weights.safetensors").stat().st_mode & 0o777 == 0o644
