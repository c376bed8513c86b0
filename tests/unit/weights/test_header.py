"""The header pass: what is sound agrees with the reference library, and nothing unsound gets through."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from cabochon.base.errors import BadInput, MissingResource
from cabochon.weights.header import MAX_HEADER, read_header

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array(5, dtype=np.float16),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "c": np.arange(8, dtype=np.int64),
}
VALID = save(TENSORS, metadata={"format": "np"})
reuse_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)


def values(path: Path) -> dict[str, np.ndarray]:
    """The file's content by our header alone."""
    raw = path.read_bytes()
    kinds = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
    return {
        name: np.frombuffer(raw[t.start : t.start + t.nbytes], kinds[t.dtype]).reshape(t.shape)
        for name, t in read_header(path).items()
    }


def write(path: Path, header: Any, data: bytes = b"\0" * 8) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_a_sound_file_reads_as_in_the_reference_library(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    ours, theirs = values(path), load_file(path)
    assert ours.keys() == theirs.keys() == TENSORS.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype
        assert np.array_equal(ours[name], value)


@pytest.mark.parametrize(
    ("header", "cause"),
    [
        ({"x": entry(), "y": entry()}, "overlaps"),
        ({"x": entry(offsets=(4, 12))}, "hole"),
        ({"x": entry(offsets=(0, 16), shape=(4,))}, "the file has"),
        ({}, "the file has"),
        ({"x": entry(shape=(3,))}, "its offsets span 8"),
        ({"x": entry(shape=(-2,))}, "shape"),
        ({"x": entry(shape=(2.0,))}, "shape"),
        ({"x": entry(shape=(True, 2))}, "shape"),
        ({"x": entry(shape="2")}, "shape"),
        ({"x": entry(shape=(2**62, 4, 2**62))}, "shape"),
        ({"x": entry(shape=(1,) * 9 + (2,))}, "shape"),
        ({"x": entry(shape=(2**61, 2**61))}, "its offsets span"),
        ({"x": entry(offsets=(8, 0))}, "its offsets span"),
        ({"x": entry(offsets=(0, 8, 8))}, "offsets"),
        ({"x": entry(offsets=(0, 8.0))}, "offsets"),
        ({"x": entry(offsets=(-8, 0))}, "offsets"),
        ({"x": entry(dtype="F33")}, "unknown dtype"),
        ({"x": entry(dtype=["F32"])}, "unknown dtype"),
        ({"x": {**entry(), "more": 1}}, "not a dtype, a shape and offsets"),
        ({"x": 1}, "not a dtype, a shape and offsets"),
        (b'{"x": %s, "x": %s}' % ((json.dumps(entry()).encode(),) * 2), "'x' is in it twice"),
        (b'{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', "in it twice"),
        (b'{"x": NaN}', "sound JSON"),
        (b'{"x": ' + b"[" * 100_000, "sound JSON"),
        (b'{"\xff": 1}', "sound JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}", "sound JSON"),
        (b"[]", "does not begin like"),
        (b" {}", "does not begin like"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, cause: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_header(write(tmp_path / "x.safetensors", header))
    assert cause in caught.value.cause
    assert str(caught.value).count("\n") == 2


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**63, 2**64 - 1, 1000])
def test_a_header_longer_than_the_file_or_the_limit_is_refused(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 100)
    with pytest.raises(BadInput, match="claims"):
        read_header(path)


@pytest.mark.parametrize("cut", [*range(12), len(VALID) // 2, len(VALID) - 1])
def test_a_truncated_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID[:cut])
    with pytest.raises(BadInput):
        read_header(path)


def test_a_name_that_a_terminal_would_obey_is_escaped(tmp_path: Path) -> None:
    with pytest.raises(BadInput) as caught:
        read_header(write(tmp_path / "x.safetensors", {"\x1b[2J\ud800": 1}))
    assert "\x1b" not in str(caught.value)
    str(caught.value).encode()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingResource):
        read_header(tmp_path / "x.safetensors")


@reuse_folder
@given(raw=st.binary(max_size=300))
def test_random_bytes_are_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    for content in (raw, struct.pack("<Q", len(raw)) + raw, struct.pack("<Q", len(raw) + 1) + b"{" + raw):
        path.write_bytes(content)
        # Chance can produce "{}", an empty but sound file.
        try:
            assert read_header(path) == {}
        except BadInput as error:
            assert str(error).count("\n") == 2


@reuse_folder
@given(data=st.data())
def test_a_changed_file_is_refused_or_means_what_the_reference_library_reads(
    tmp_path: Path, data: st.DataObject
) -> None:
    path, raw = tmp_path / "x.safetensors", bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "cut"]))
        if kind == "set":
            raw[at] = data.draw(st.sampled_from(list(b'{}[]",:0123456789aF\0\xff')))
        elif kind == "insert":
            raw.insert(at, data.draw(st.integers(0, 255)))
        elif kind == "delete" and len(raw) > 1:
            del raw[at]
        elif at:
            del raw[at:]
    path.write_bytes(raw)
    try:
        ours = read_header(path)
    except BadInput:
        return
    assert sum(t.nbytes for t in ours.values()) == len(raw) - 8 - int.from_bytes(raw[:8], "little")
    theirs = load_file(path)
    assert ours.keys() == theirs.keys()
    for name, stored in ours.items():
        assert stored.shape == theirs[name].shape
        assert raw[stored.start : stored.start + stored.nbytes] == theirs[name].tobytes()
