"""Files and folders appear whole or not at all."""

from pathlib import Path

import pytest

from cabochon.base.errors import UsageError
from cabochon.base.files import atomic_folder, atomic_write, sha256


class Stop(Exception):
    pass


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "f") as file:
        file.write(b"new")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f").read_bytes() == b"new"
    assert names(tmp_path) == ["f"]


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(Stop), atomic_write(tmp_path / "f") as file:
        file.write(b"new")
        raise Stop
    assert (tmp_path / "f").read_bytes() == b"old"
    assert names(tmp_path) == ["f"]


def test_modes_are_those_of_ordinary_files(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    (tmp_path / "kept").chmod(0o640)
    (tmp_path / "ordinary").touch()
    for name in ("kept", "new"):
        with atomic_write(tmp_path / name):
            pass
    with atomic_folder(tmp_path / "folder"):
        pass
    (tmp_path / "ordinary folder").mkdir()
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "ordinary folder").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


@pytest.mark.parametrize("existing", [False, True])
def test_a_folder_appears_at_the_end(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "deep" / "m[1]"
    if existing:
        target.mkdir(parents=True)
    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "f").write_text("x")
        assert not target.exists() or names(target) == []
    assert (target / "sub" / "f").read_text() == "x"
    assert names(target.parent) == ["m[1]"]


def test_a_folder_in_use_is_replaced_only_on_request(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(UsageError, match="not empty"), atomic_folder(target):
        raise AssertionError("unreachable")
    with pytest.raises(Stop), atomic_folder(target, overwrite=True):
        raise Stop
    assert names(target) == ["old"]
    with atomic_folder(target, overwrite=True) as temporary:
        (temporary / "new").touch()
    assert names(target) == ["new"]
    assert names(tmp_path) == ["m"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not empty"), atomic_folder(tmp_path / "m"):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "other").touch()
    assert names(tmp_path / "m") == ["other"]
    assert names(tmp_path) == ["m"]


def test_a_file_and_a_mount_are_no_targets(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for path in (tmp_path / "f", Path("/")):
        with pytest.raises(UsageError), atomic_folder(path, overwrite=True):
            raise AssertionError("unreachable")


def test_a_dead_process_is_cleaned_up_after_and_a_live_one_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".m.dead.partial").mkdir()
    (tmp_path / ".m.dead.partial" / "half").touch()
    (tmp_path / ".other.dead.partial").mkdir()
    with atomic_folder(tmp_path / "m") as first:
        assert not (tmp_path / ".m.dead.partial").exists()
        with pytest.raises(Stop), atomic_folder(tmp_path / "m"):
            assert first.exists()
            raise Stop
        assert first.exists()
    assert names(tmp_path) == [".other.dead.partial", "m"]


def test_an_unwritable_place_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    for write in (atomic_write, atomic_folder):
        with pytest.raises(OSError), write(tmp_path / "f" / "below"):
            raise AssertionError("unreachable")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f").startswith("ba7816bf8f01cfea")
    assert names(tmp_path) == ["f"]
