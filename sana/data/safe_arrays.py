"""Reading .npy and .npz content from a data set that nobody vouches for: no pickles, no size that is not there.

Which arrays a record holds is in `webdataset.py`.
"""

import io
import math
import zipfile
import zlib
from collections.abc import Collection

import numpy as np

MAX_NPZ_BYTES = 256 << 20  # unpacked; the features of one caption have about 1 MB
_NUMBERS = "biuf"
_HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npy_shape(content: bytes) -> tuple[int, ...]:
    """Returns the shape that the header of a .npy file declares; `content` may be only its beginning.

    Raises:
        ValueError: it is no .npy file of numbers.
    """
    return _header(io.BytesIO(content))[0]


def read_npy(content: bytes) -> np.ndarray:
    """Decodes a .npy file.

    Args:
        content: the whole file.

    Returns:
        The array, of numbers; read-only.

    Raises:
        ValueError: it is no .npy file of numbers, holds pickled objects, or not as many bytes as it declares.
    """
    file = io.BytesIO(content)
    shape, fortran_order, dtype = _header(file)
    declared, there = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if declared != there:
        raise ValueError(f"the array declares {declared} bytes of numbers, and {there} are there")
    flat = np.frombuffer(content, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran_order else "C")


def read_npz(content: bytes, names: Collection[str]) -> dict[str, np.ndarray]:
    """Decodes the wanted arrays of a .npz file; those that it does not have are left out.

    Args:
        content: the whole file.
        names: of the arrays, without ".npy".

    Raises:
        ValueError: it is no .npz file, unpacks to more than `MAX_NPZ_BYTES`, or an array is not as `read_npy` needs.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            declared = sum(info.file_size for info in archive.infolist())
            if declared > MAX_NPZ_BYTES:
                raise ValueError(f"the archive unpacks to {declared} bytes; at most {MAX_NPZ_BYTES} are allowed")
            wanted = {info.filename: info for info in archive.infolist() if info.filename.endswith(".npy")}
            arrays = {}
            for name in names:
                if info := wanted.get(f"{name}.npy"):
                    with archive.open(info) as file:  # reads no more than the declared size
                        arrays[name] = read_npy(file.read(info.file_size))
            return arrays
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"the archive is damaged: {error}") from error


def _header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    if version not in _HEADER_READERS:
        raise ValueError(f"the version {version} of the array format is not known")
    shape, fortran_order, dtype = _HEADER_READERS[version](file)
    if dtype.hasobject or dtype.kind not in _NUMBERS:
        raise ValueError(f"the array holds {dtype}, and only numbers are read")
    if any(side < 0 for side in shape):
        raise ValueError(f"the array declares the shape {shape}")
    return shape, fortran_order, dtype
