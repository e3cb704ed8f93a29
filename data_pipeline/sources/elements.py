"""AnnData's elements on disk, decoded: a column of obs or var, the columns there are, the parts of a sparse matrix.

The elements are groups and arrays of h5py or of zarr, which answer to the same names. Covers the encodings of anndata
0.5 (compound data sets, categories in `uns`), 0.7 (`__categories`) and 0.8 on (a group a categorical or nullable
column). https://anndata.readthedocs.io/en/latest/fileformat-prose.html
"""
import math
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Element: TypeAlias = Any    # h5py.Group, h5py.Dataset, zarr.Group or zarr.Array
Frame: TypeAlias = Any      # obs or var: a group of columns, or (0.5) a compound data set
_TEXT = "SOUT"              # kinds of NumPy's types that hold text: bytes, objects, fixed and variable str


def is_array(element: Element) -> bool:
    """Whether it is an array (a data set), not a group."""
    return hasattr(element, "shape")


def column_names(frame: Frame) -> list[str]:
    """The columns of obs or var, in their order, without the index; one that is named but missing among them."""
    if is_array(frame):
        return [name for name in frame.dtype.names or () if name != index_name(frame)]
    hidden = {index_name(frame), "__categories"}
    order = [_text(name) for name in frame.attrs.get("column-order", ())]
    return [*dict.fromkeys(order), *sorted(set(frame) - set(order) - hidden)]


def index_name(frame: Frame) -> str:
    """The column that names the rows."""
    if is_array(frame):
        names = frame.dtype.names or ()
        return "index" if "index" in names else (names[0] if names else "index")
    found = _text(frame.attrs.get("_index", "_index"))
    return found if found in frame or "index" not in frame else "index"


def n_rows(frame: Frame) -> int:
    """Rows of obs or var."""
    if is_array(frame):
        return int(frame.shape[0])
    return _length(frame[index_name(frame)])


def column_length(frame: Frame, name: str) -> int:
    """Rows of one column; a well-formed frame has the same number in all of them."""
    if is_array(frame):
        return int(frame.shape[0])
    if name not in frame:
        raise ValueError(f"the column '{name}' is named among the columns, but missing")
    return _length(frame[name])


def read_column(frame: Frame, name: str, first: int, last: int) -> pa.Array:
    """Rows [first, last) of a column: categories as dictionary<int32, string>, else string, numbers or booleans."""
    if is_array(frame):
        values = frame.fields(name)[first:last] if hasattr(frame, "fields") else frame[first:last][name]
        categories = frame.file.get(f"uns/{name}_categories") if hasattr(frame, "file") else None
        return _plain(values) if categories is None else _categorical(values, categories[:])
    element = frame[name]
    if is_array(element):
        reference = element.attrs.get("categories")
        if reference is None:
            return _plain(element[first:last])
        held = frame[reference] if isinstance(reference, str) else element.file[reference]   # zarr: a path
        return _categorical(element[first:last], held[:])
    if "codes" in element:
        categories = element["categories"]
        held = read_column(element, "categories", 0, _length(categories))
        return _categorical(element["codes"][first:last], held)
    if "values" in element and "mask" in element:
        return _plain(element["values"][first:last], element["mask"][first:last].astype(bool))
    kind = _text(element.attrs.get("encoding-type", "group"))
    raise ValueError(f"the column '{name}' has the unknown encoding '{kind}'")


def is_text(frame: Frame, name: str) -> bool:
    """Whether a column is there and holds text, told without reading it."""
    if is_array(frame):
        return frame.dtype[name].kind in _TEXT
    if name not in frame:
        return False
    element = frame[name]
    if is_array(element):
        return element.dtype.kind in _TEXT or "categories" in element.attrs
    return "codes" in element or ("values" in element and element["values"].dtype.kind in _TEXT)


def sparse_format(element: Element) -> str:
    """`csr`, `csc` or `dense`; ValueError for anything else."""
    if is_array(element):
        return "dense"
    kind = _text(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "unknown")))
    kind = kind.removesuffix("_matrix")
    if kind not in {"csr", "csc"} or not {"data", "indices", "indptr"} <= set(element):
        raise ValueError(f"a matrix of the unknown encoding '{kind}'")
    return kind


def matrix_shape(element: Element) -> tuple[int, int]:
    """(cells, genes) of a matrix."""
    shape = element.shape if is_array(element) else element.attrs.get("shape", element.attrs.get("h5sparse_shape", ()))
    if len(shape) != 2:
        raise ValueError(f"a matrix of shape {tuple(int(n) for n in shape)}")
    return int(shape[0]), int(shape[1])


def check_numbers(array: Element, *, kinds: str = "buif") -> None:
    """Raise ValueError unless an array is of real numbers (by NumPy's letters of kinds); text would be parsed."""
    if array.dtype.kind not in kinds:
        raise ValueError(f"numbers of the type {array.dtype}")


def chunk_bytes(array: Element) -> int:
    """Bytes of one decoded chunk of an array: what reading any part of it holds at least; 0 where it has no chunks."""
    if not array.chunks or array.dtype.itemsize == 0:
        return 0
    return int(array.dtype.itemsize) * math.prod(int(size) for size in array.chunks)


def missing_chunks(array: Element) -> int:
    """Chunks of an array that nobody has written: they read as zeros."""
    if not array.chunks:
        return 0
    stored = array.id.get_num_chunks() if hasattr(array, "id") else array.nchunks_initialized
    expected = math.prod(-(-size // step) for size, step in zip(array.shape, array.chunks, strict=True))
    return max(int(expected) - int(stored), 0)


def _length(element: Element) -> int:
    if is_array(element):
        return int(element.shape[0]) if element.shape else 0
    return int(element["codes" if "codes" in element else "values"].shape[0])


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _plain(values: NDArray[np.generic], null: NDArray[np.bool_] | None = None) -> pa.Array:
    if values.dtype.kind in _TEXT:
        words = [value.decode(errors="replace") if isinstance(value, bytes) else
                 None if value is None or value != value else str(value) for value in values.tolist()]
        return pa.array(words, pa.string(), mask=null)
    if values.dtype.kind == "V" or (values.dtype.names and set(values.dtype.names) <= {"r", "i"}):
        raise ValueError("a column of an unknown type")
    if values.dtype.kind == "f":
        return pa.array(values, mask=null, from_pandas=True)   # NaN is a missing value
    return pa.array(values.astype(bool) if values.dtype.kind == "b" else values, mask=null)


def _categorical(codes: NDArray[np.integer], categories: pa.Array | NDArray[np.generic]) -> pa.Array:
    held = categories if isinstance(categories, pa.Array) else _plain(categories)
    n_categories = len(held)
    if codes.dtype.kind not in "iu":
        raise ValueError(f"category codes of the type {codes.dtype}")
    codes = codes.astype(np.int64)
    if len(codes) and (codes.max() >= n_categories or codes.min() < -1):
        raise ValueError(f"a category code outside the {n_categories} categories")
    indices = pa.array(codes.astype(np.int32), mask=codes < 0)
    if pa.types.is_string(held.type):
        return pa.DictionaryArray.from_arrays(indices, held)
    return held.take(indices)
