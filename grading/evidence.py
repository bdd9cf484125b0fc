"""Evidence on disk: .npz files that learners' kernels wrote, read without believing them."""

from __future__ import annotations

import ast
import io
import math
import zipfile
from pathlib import Path

import numpy as np

from grading.files import read_plain
from robustkit.contracts import Arrays
from robustkit.errors import RobustkitError

MOST_BYTES = 64 * 2**20  # per exercise; the weights of the course's models are a tenth of it
MOST_ARRAYS = 512
MOST_HEADER = 1000  # bytes; numpy writes 118 for any array that is read here
_HEADER = 10  # bytes before the header's text in version 1.0 of the .npy format


def take(path: Path) -> bytes:
    """The bytes of a file that a learner's kernel left behind. Raises: RobustkitError when it is not a plain one."""
    return read_plain(path, MOST_BYTES)


def parse(data: bytes) -> Arrays:
    """The arrays in the bytes of an .npz file. Nothing is unpacked, and no size is believed before it is checked.

    Raises: RobustkitError unless the file is what numpy.savez writes: stored, plain numeric arrays.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
            if len(members) > MOST_ARRAYS:
                raise ValueError(f"{len(members)} arrays, at most {MOST_ARRAYS} are read")
            if len({member.filename for member in members}) < len(members):
                raise ValueError("two arrays of one name")
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise ValueError("more bytes inside than outside")
            arrays = {}
            for member in members:
                if member.compress_type != zipfile.ZIP_STORED or not member.filename.endswith(".npy"):
                    raise ValueError("not what numpy.savez writes")
                arrays[member.filename.removesuffix(".npy")] = _array(archive.read(member))
            return arrays
    except (
        ValueError,
        TypeError,
        SyntaxError,
        KeyError,
        MemoryError,
        RecursionError,
        zipfile.BadZipFile,
    ) as error:
        raise RobustkitError(f"the evidence is malformed ({error}); the exercise earns nothing.") from error
    except (EOFError, NotImplementedError, RuntimeError, OverflowError) as error:
        raise RobustkitError(
            f"the evidence is malformed ({type(error).__name__}); the exercise earns nothing."
        ) from error


def _array(data: bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    if data[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("not version 1.0 of the .npy format")
    end = _HEADER + int.from_bytes(data[8:10], "little")
    if end > _HEADER + MOST_HEADER:
        raise ValueError(f"a header of {end - _HEADER} bytes")
    header = ast.literal_eval(data[_HEADER:end].decode("latin1").strip())
    descr, shape, fortran = header["descr"], header["shape"], header["fortran_order"]
    if not isinstance(descr, str) or len(descr) > 8:
        raise ValueError("structured arrays are not read")
    dtype = np.dtype(descr)
    if dtype.kind not in "biuf":
        raise ValueError(f"arrays of {descr} are not read")
    if not all(type(length) is int and 0 <= length <= MOST_BYTES for length in shape) or len(shape) > 8:
        raise ValueError("an impossible shape")
    if math.prod(shape) * dtype.itemsize != len(data) - end:
        raise ValueError("a shape that does not fit the data")
    array = np.frombuffer(data, dtype=dtype, offset=end).copy()
    return array.reshape(shape, order="F" if fortran else "C")
