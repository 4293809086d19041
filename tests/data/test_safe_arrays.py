"""Arrays come out as numpy wrote them; pickles and sizes that are not there are refused before memory is taken."""

import io
import struct
import zipfile

import numpy as np
import pytest

from sana.data import safe_arrays
from sana.data.safe_arrays import npy_shape, read_npy, read_npz
from tests.data.tars import npy, npz


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.asfortranarray(np.arange(6, dtype=np.float16).reshape(2, 3)),
        np.array(3, dtype=np.int64),
        np.zeros((0, 4), np.uint8),
        np.arange(3, dtype=">f4"),
    ],
)
def test_arrays_are_those_that_numpy_wrote(array):
    assert npy_shape(npy(array)) == array.shape
    read = read_npy(npy(array))
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(read, array)


def declared(shape: tuple[int, ...], payload: bytes) -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + payload


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (declared((10**6, 10**6), b"\0" * 16), "declares 4000000000000 bytes of numbers, and 16 are there"),
        (declared((4,), b"\0" * 15), "declares 16 bytes of numbers, and 15"),
        (declared((-4,), b"\0" * 16), "declares the shape"),
        (b"", "magic"),
        (b"\x93NUMPY\x07\x00" + b"\0" * 64, "not known"),
    ],
)
def test_damaged_arrays_are_refused(content, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_npy(content)


def test_pickled_objects_are_refused():
    with pytest.raises(ValueError, match="only numbers are read"):
        read_npy(npy(np.array([{"a": 1}], dtype=object)))
    with pytest.raises(ValueError, match="only numbers are read"):
        read_npz(npz(caption_feature=np.array([print], dtype=object)), ["caption_feature"])


def test_only_the_wanted_arrays_of_an_archive_are_read():
    content = npz(a=np.arange(3), b=np.array([object()], dtype=object))
    found = read_npz(content, ["a", "missing"])
    assert list(found) == ["a"]
    np.testing.assert_array_equal(found["a"], np.arange(3))


def test_a_zip_bomb_is_refused_by_what_it_declares(monkeypatch):
    monkeypatch.setattr(safe_arrays, "MAX_NPZ_BYTES", 10_000)
    bomb = npz(caption_feature=np.zeros(10_000, np.float32))
    assert len(bomb) < 1000
    with pytest.raises(ValueError, match=r"unpacks to 40\d+ bytes; at most 10000"):
        read_npz(bomb, ["caption_feature"])


def test_an_archive_that_declares_too_little_gives_no_more():
    bomb = bytearray(npz(caption_feature=np.zeros(10_000, np.float32)))
    with zipfile.ZipFile(io.BytesIO(bytes(bomb))) as archive:
        true = archive.infolist()[0].file_size
    forged = bytes(bomb).replace(struct.pack("<L", true), struct.pack("<L", 200))
    with pytest.raises(ValueError, match=r"damaged|declares"):
        read_npz(forged, ["caption_feature"])


def test_what_is_no_archive_is_refused():
    with pytest.raises(ValueError, match="damaged"):
        read_npz(b"PK no", ["caption_feature"])
    whole = npz(caption_feature=np.arange(1000))
    with pytest.raises(ValueError, match="damaged"):
        read_npz(whole[: len(whole) // 2], ["caption_feature"])
