"""AnnData's elements on disk, decoded: a column of obs or var, the columns there are, the parts of a sparse matrix.

Covers the encodings of anndata 0.5 (compound data sets, categories in `uns`), 0.7 (`__categories`) and 0.8 on (a group
a categorical or nullable column). https://anndata.readthedocs.io/en/latest/fileformat-prose.html
"""
from typing import TypeAlias

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Frame: TypeAlias = h5py.Group | h5py.Dataset    # obs or var: a group of columns, or (0.5) a compound data set


def column_names(frame: Frame) -> list[str]:
    """The columns of obs or var, in their order, without the index."""
    if isinstance(frame, h5py.Dataset):
        return [name for name in frame.dtype.names or () if name != index_name(frame)]
    hidden = {index_name(frame), "__categories"}
    order = [_text(name) for name in frame.attrs.get("column-order", ())]
    return [*(name for name in order if name in frame), *sorted(set(frame) - set(order) - hidden)]


def index_name(frame: Frame) -> str:
    """The column that names the rows."""
    if isinstance(frame, h5py.Dataset):
        names = frame.dtype.names or ()
        return "index" if "index" in names else (names[0] if names else "index")
    found = _text(frame.attrs.get("_index", "_index"))
    return found if found in frame or "index" not in frame else "index"


def n_rows(frame: Frame) -> int:
    """Rows of obs or var."""
    if isinstance(frame, h5py.Dataset):
        return int(frame.shape[0])
    return _length(frame[index_name(frame)])


def column_length(frame: Frame, name: str) -> int:
    """Rows of one column; a well-formed frame has the same number in all of them."""
    return int(frame.shape[0]) if isinstance(frame, h5py.Dataset) else _length(frame[name])


def read_column(frame: Frame, name: str, first: int, last: int) -> pa.Array:
    """Rows [first, last) of a column: categories as dictionary<int32, string>, else string, numbers or booleans."""
    if isinstance(frame, h5py.Dataset):
        values = frame.fields(name)[first:last]
        categories = frame.file.get(f"uns/{name}_categories")
        return _plain(values) if categories is None else _categorical(values, categories[:])
    element = frame[name]
    if isinstance(element, h5py.Dataset):
        reference = element.attrs.get("categories")
        if reference is None:
            return _plain(element[first:last])
        return _categorical(element[first:last], element.file[reference][:])
    if "codes" in element:
        categories = element["categories"]
        held = read_column(element, "categories", 0, _length(categories))
        return _categorical(element["codes"][first:last], held)
    if "values" in element and "mask" in element:
        return _plain(element["values"][first:last], element["mask"][first:last].astype(bool))
    kind = _text(element.attrs.get("encoding-type", "group"))
    raise ValueError(f"the column '{name}' has the unknown encoding '{kind}'")


def is_text(frame: Frame, name: str) -> bool:
    """Whether a column holds text, told without reading it."""
    if isinstance(frame, h5py.Dataset):
        return frame.dtype[name].kind in "SO"
    element = frame[name]
    if isinstance(element, h5py.Dataset):
        return element.dtype.kind in "SO" or "categories" in element.attrs
    return "codes" in element or ("values" in element and element["values"].dtype.kind in "SO")


def sparse_format(element: h5py.Group | h5py.Dataset) -> str:
    """`csr`, `csc` or `dense`; ValueError for anything else."""
    if isinstance(element, h5py.Dataset):
        return "dense"
    kind = _text(element.attrs.get("encoding-type", element.attrs.get("h5sparse_format", "unknown")))
    kind = kind.removesuffix("_matrix")
    if kind not in {"csr", "csc"} or not {"data", "indices", "indptr"} <= set(element):
        raise ValueError(f"a matrix of the unknown encoding '{kind}'")
    return kind


def matrix_shape(element: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    """(cells, genes) of a matrix."""
    if isinstance(element, h5py.Dataset):
        shape = element.shape
    else:
        shape = element.attrs.get("shape", element.attrs.get("h5sparse_shape", ()))
    if len(shape) != 2:
        raise ValueError(f"a matrix of shape {tuple(int(n) for n in shape)}")
    return int(shape[0]), int(shape[1])


def _length(element: h5py.Group | h5py.Dataset) -> int:
    if isinstance(element, h5py.Dataset):
        return int(element.shape[0]) if element.shape else 0
    return int(element["codes" if "codes" in element else "values"].shape[0])


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _plain(values: NDArray[np.generic], null: NDArray[np.bool_] | None = None) -> pa.Array:
    if values.dtype.kind in "SO":
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
    codes = codes.astype(np.int32)
    if len(codes) and (codes.max() >= n_categories or codes.min() < -1):
        raise ValueError(f"a category code outside the {n_categories} categories")
    indices = pa.array(codes, mask=codes < 0)
    if pa.types.is_string(held.type):
        return pa.DictionaryArray.from_arrays(indices, held)
    return held.take(indices)
