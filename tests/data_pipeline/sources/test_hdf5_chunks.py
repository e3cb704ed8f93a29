from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.hdf5_chunks import Reader

TYPES = ["int8", "uint16", "int32", "float32", "int64", "float64"]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TYPES), st.booleans(), st.integers(1, 40), st.integers(1, 90), st.data())
def test_every_range_is_what_h5py_reads(tmp_path_factory: pytest.TempPathFactory, kind: str, shuffle: bool, chunk: int,
                                        n_values: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, n_values))
    last = data.draw(st.integers(first, n_values + 3))
    written = np.random.default_rng(n_values).integers(0, 120, n_values).astype(kind)
    with h5py.File(tmp_path_factory.mktemp("h") / "a.h5", "w") as file:
        array = file.create_dataset("a", data=written, chunks=(chunk,), maxshape=(None,), compression="gzip",
                                    shuffle=shuffle)
        reader = Reader.of(array)
        found, inflated = reader.read(first, last), reader._inflate(first, min(last, n_values))
        assert found.dtype == inflated.dtype == array.dtype
        assert found.tolist() == inflated.tolist() == array[first:last].tolist()


@pytest.mark.parametrize("options", [
    {}, {"chunks": (7,)}, {"chunks": (7,), "compression": "lzf"}, {"chunks": (7,), "shuffle": True},
    {"chunks": (7,), "compression": "gzip", "fletcher32": True},
    {"dtype": ">i4", "chunks": (7,), "compression": "gzip"},
], ids=["contiguous", "plain", "lzf", "shuffled", "checked", "big-endian"])
def test_h5py_reads_what_is_stored_in_another_way(tmp_path: Path, options: dict[str, object],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reader, "_inflate", None)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", data=np.arange(50), **options)
        assert Reader.of(array).read(3, 44).tolist() == list(range(3, 44))


def test_a_chunk_that_was_never_written_holds_the_fill_value(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", (30,), "i4", chunks=(10,), compression="gzip", fillvalue=7)
        array[:10] = 1
        assert Reader.of(array).read(5, 15).tolist() == [1] * 5 + [7] * 5


def test_a_chunk_that_was_stored_without_the_filter_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", (20,), "i4", chunks=(10,), compression="gzip", shuffle=True)
        array[:] = np.arange(20)
        array.id.write_direct_chunk((10,), np.arange(10, 20, dtype=np.int32).tobytes(), filter_mask=0b11)
        assert Reader.of(array).read(0, 20).tolist() == list(range(20))


@pytest.mark.parametrize("damage", ["cut", "bit", "checksum"])
def test_a_damaged_chunk_is_an_error_and_not_other_values(tmp_path: Path, damage: str) -> None:
    draw = np.random.default_rng(0)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        array = file.create_dataset("a", data=draw.integers(0, 9, 4000), chunks=(1000,), compression="gzip")
        packed = array.id.read_direct_chunk((1000,))[1]
        place = {"cut": 0, "bit": len(packed) // 2, "checksum": len(packed) - 1}[damage]
        spoiled = packed[:40] if damage == "cut" else packed[:place] + bytes([packed[place] ^ 4]) + packed[place + 1:]
        array.id.write_direct_chunk((1000,), spoiled)
        assert len(Reader.of(array).read(0, 1000)) == 1000
        with pytest.raises(OSError, match="filter"):
            Reader.of(array).read(500, 1500)
