"""A model out of a bucket: whole or not at all, through a service that is not always well."""

import io
from pathlib import Path

import pytest
from platforms import Bucket, bucket

from cabochon.base.errors import BadInput, CabochonError, MissingResource
from cabochon.deploy.storage import Storage, inside, parsed

OBJECTS = {
    "a/config.json": b"{}", "a/sub dir/model+1.safetensors": bytes(range(256)) * 100, "a/": b"", "a/ä?#%.txt": b"x",
    "a/empty": b"", "ab/other": b"not below a/", "z": b"",
}  # fmt: skip


def storage(server: Bucket) -> Storage:
    return Storage(server.environment, wait=0)


def test_everything_below_a_path_comes_and_nothing_else(tmp_path: Path) -> None:
    with bucket(OBJECTS) as server:
        folder = storage(server).download("gs://models/a", tmp_path / "model")
        got = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        assert got == {
            name.removeprefix("a/"): content
            for name, content in OBJECTS.items()
            if name.startswith("a/") and not name.endswith("/")
        }
        assert storage(server).download("gs://models/a/sub dir/", folder) == folder  # what was there is replaced
        assert [file.name for file in folder.iterdir()] == ["model+1.safetensors"]


@pytest.mark.parametrize("trouble", [[503, 429, 500], [401], ["short"], ["short", "short", 503]])
def test_it_asks_again(tmp_path: Path, trouble: list) -> None:
    with bucket({"a/x": b"abcdefgh"}) as server:
        server.trouble = trouble
        assert (storage(server).download("gs://models/a", tmp_path / "m") / "x").read_bytes() == b"abcdefgh"
        assert not server.trouble


def test_what_does_not_get_better_is_said(tmp_path: Path) -> None:
    with bucket({"a/x": b"abcdefgh"}) as server:
        for trouble in ([403], [500] * 5, ["short"] * 5):
            server.trouble = list(trouble)
            with pytest.raises(MissingResource, match="cannot be read"):
                storage(server).download("gs://models/a", tmp_path / "m")
            assert not server.trouble
        with pytest.raises(MissingResource, match="no model"):
            storage(server).download("gs://models/b", tmp_path / "m")
        with pytest.raises(MissingResource, match="404"):
            storage(server).download("gs://nobody/b", tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bucket({"a/x": b"abcdefgh"}) as server:
        monkeypatch.setattr(Path, "open", lambda _, mode: io.FileIO("/dev/full", mode))
        with pytest.raises(MissingResource, match="not written") as caught:
            storage(server).download("gs://models/a", tmp_path / "m")
        assert caught.value.cause == "No space left on device"
        assert sum("alt=media" in path for path in server.asked) == 1
        monkeypatch.undo()
        (tmp_path / "file").touch()
        with pytest.raises(MissingResource, match="not written"):
            storage(server).download("gs://models/a", tmp_path / "file" / "m")


def test_other_bytes_of_the_same_length_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with bucket({"a/x": b"abcdefgh"}) as server:
        listed = list(storage(server).listed("models", "a/"))
        server.objects["a/x"] = b"abcdefgX"
        monkeypatch.setattr(Storage, "listed", lambda *_: iter(listed))
        with pytest.raises(MissingResource, match="other bytes"):
            storage(server).download("gs://models/a", tmp_path / "m")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "a\\..\\x", "x\0", ""])
def test_no_object_leads_out_of_the_folder(name: str) -> None:
    with pytest.raises(BadInput, match="out of the folder"):
        inside(name)


def test_addresses() -> None:
    assert parsed("gs://b/a/c") == parsed("gs://b//a/c/") == ("b", "a/c/")
    assert parsed("gs://b") == parsed("gs://b/") == ("b", "")
    for wrong in ("", "gs://", "s3://b/a", "/a"):
        with pytest.raises(CabochonError, match="no place"):
            parsed(wrong)
