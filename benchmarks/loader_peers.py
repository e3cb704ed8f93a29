"""Other projects' loaders on the same cells, each at what it can do of the same work: stored values, shuffled.

Run as a program by an interpreter that holds the peer, which needs nothing of ours: `benchmarks/loader.py` starts it.
Each writes its own form once, under a temporary name until it is complete, and hands over joined genes and values.
"""
import importlib
import importlib.util
import json
import os
import secrets
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loader_timing import Batch, Epochs, seen, timed

BATCH = 256   # cells of a batch


@dataclass(frozen=True, slots=True)
class Cells:
    """The cells to read, in the two forms that peers make theirs of."""

    folder: Path    # where forms are kept
    n_cells: int
    cores: int

    @property
    def h5ad(self) -> Path:
        """An h5ad file of them."""
        return self.folder / f"cells-{self.n_cells}.h5ad"

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(values,) genes and expressions, (cells + 1,) offsets; mapped."""
        names = ("genes", "expressions", "offsets")
        genes, expressions, offsets = (np.load(self.folder / f"arrays-{self.n_cells}" / f"{name}.npy", mmap_mode="r")
                                       for name in names)
        return genes, expressions, np.asarray(offsets)

    def cell(self, arrays: tuple[np.ndarray, np.ndarray, np.ndarray], number: int) -> dict[str, np.ndarray]:
        """Cell `number` as a sample of two arrays, in the types that samples of tokens commonly have."""
        genes, expressions, offsets = arrays
        span = slice(offsets[number], offsets[number + 1])
        return {"genes": genes[span].astype(np.int32), "values": expressions[span].astype(np.float32)}

    def form(self, name: str) -> Path:
        """Where a peer's form is."""
        return self.folder / f"{name}-{self.n_cells}"


@dataclass(frozen=True, slots=True)
class Peer:
    """One project."""

    module: str      # what must be importable
    package: str     # what pip installs it by
    work: str        # what it does of the work, in one phrase
    write: Callable[[Cells, Path], None]
    begin: Callable[[Cells, Path], Epochs]


@contextmanager
def made(path: Path) -> Iterator[Path]:
    """A temporary path that is named `path` once the block succeeds; what a killed attempt left is no form."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    yield temporary
    temporary.rename(path)


def joined(samples: Sequence[dict[str, Any]]) -> tuple[int, Any, Any]:
    """Samples of two arrays, one after the other."""
    return (len(samples), np.concatenate([sample["genes"] for sample in samples]),
            np.concatenate([sample["values"] for sample in samples]))


def loaded(dataset: Any, cells: Cells, **settings: Any) -> Any:
    """torch's DataLoader, with a process a core where there are two."""
    from torch.utils.data import DataLoader

    return DataLoader(dataset, num_workers=0 if cells.cores == 1 else cells.cores, **settings)


def of_csr(matrices: Iterator[Any]) -> Iterator[Batch]:
    """Batches of CSR matrices."""
    for matrix in matrices:
        yield Batch(matrix.shape[0], matrix.indices, matrix.data)


# ---- annbatch


def write_annbatch(cells: Cells, path: Path) -> None:
    """Its shuffled collection of Zarr shards."""
    from annbatch import DatasetCollection

    DatasetCollection(path).add_adatas(adata_paths=[cells.h5ad], shuffle=True, rng=np.random.default_rng(0))


def begin_annbatch(cells: Cells, path: Path) -> Epochs:
    """64 slices of 64 neighbours are held and mixed; the Rust pipeline of zarrs."""
    import anndata
    import zarr
    from annbatch import DatasetCollection, Loader

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": cells.cores})

    def opened(group: Any) -> Any:
        return anndata.AnnData(X=anndata.io.sparse_dataset(group["X"]))

    loader = Loader(batch_size=BATCH, chunk_size=64, preload_nchunks=64, shuffle=True, to=None,
                    rng=np.random.default_rng(0)).use_collection(DatasetCollection(path), load_adata=opened)
    return lambda epoch: of_csr(batch["X"] for batch in loader)


# ---- scDataset


class Rows:
    """Rows of the CSR matrix of an h5ad file, opened anew in each process."""

    def __init__(self, path: Path, n_cells: int) -> None:
        self._path, self._n_cells = path, n_cells
        self._opened: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._n_cells

    def __getitem__(self, rows: Any) -> Any:
        if os.getpid() not in self._opened:
            import anndata
            import h5py

            self._opened[os.getpid()] = anndata.io.sparse_dataset(h5py.File(self._path)["X"])
        return self._opened[os.getpid()][rows]


def write_nothing(cells: Cells, path: Path) -> None:
    """It reads the h5ad file itself."""
    path.mkdir()


def begin_scdataset(cells: Cells, path: Path) -> Epochs:
    """Blocks of 16 neighbours, 64 batches fetched together and mixed."""
    from scdataset import BlockShuffling, scDataset

    def batches(epoch: int) -> Iterator[Batch]:
        dataset = scDataset(Rows(cells.h5ad, cells.n_cells), BlockShuffling(block_size=16), batch_size=BATCH,
                            fetch_factor=64, seed=epoch)
        return of_csr(dataset if cells.cores == 1 else loaded(dataset, cells, batch_size=None))

    return batches


# ---- bionemo-scdl


def write_scdl(cells: Cells, path: Path) -> None:
    """Its memory-mapped CSR arrays."""
    from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

    SingleCellMemMapDataset(str(path), str(cells.h5ad), use_X_not_raw=True).save()


class MappedRows:
    """Rows of an SCDL store by `get_row`, which is faster than its own conversion to tensors."""

    def __init__(self, path: Path) -> None:
        from bionemo.scdl.io.single_cell_memmap_dataset import SingleCellMemMapDataset

        self._rows = SingleCellMemMapDataset(str(path))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        values, columns = self._rows.get_row(row)[0]
        return {"genes": columns, "values": values}


def begin_scdl(cells: Cells, path: Path) -> Epochs:
    """Rows one by one in any order, joined."""
    rows = MappedRows(path)

    def batches(epoch: int) -> Iterator[Batch]:
        order = np.random.default_rng(epoch).permutation(len(rows)).tolist()
        yield from (Batch(*batch) for batch in loaded(rows, cells, sampler=order, batch_size=BATCH, collate_fn=joined))

    return batches


# ---- mosaicml-streaming


def write_mds(cells: Cells, path: Path) -> None:
    """One sample a cell, as Tahoe-x1 writes them."""
    stub_torchvision()
    from streaming import MDSWriter

    arrays = cells.arrays()
    with MDSWriter(out=str(path), columns={"genes": "ndarray:int32", "values": "ndarray:float32"}) as writer:
        for number in range(cells.n_cells):
            writer.write(cells.cell(arrays, number))


def begin_mds(cells: Cells, path: Path) -> Epochs:
    """Its `py1e` shuffle, 100,000 cells looked ahead."""
    stub_torchvision()
    import streaming

    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(path), shuffle=True, shuffle_algo="py1e", shuffle_seed=0,
                                         batch_size=BATCH, predownload=100_000)
    loader = loaded(dataset, cells, batch_size=BATCH, collate_fn=joined)
    return lambda epoch: (Batch(*batch) for batch in loader)


def stub_torchvision() -> None:
    """mosaicml-streaming imports torchvision for images; where it is missing or does not load, cells need none."""
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        modules = {name: types.ModuleType(name) for name in (
            "torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.datasets")}
        for name, module in modules.items():
            module.__path__, module.__spec__ = [], importlib.util.spec_from_loader(name, loader=None)
        modules["torchvision.transforms.functional"].to_tensor = None
        modules["torchvision.datasets"].VisionDataset = object
        modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]
        modules["torchvision"].transforms = modules["torchvision.transforms"]
        modules["torchvision"].datasets = modules["torchvision.datasets"]
        sys.modules.update(modules)


# ---- litdata

RANGE = 1_000   # cells of one input of its writer


@dataclass(frozen=True)
class Ranges:
    """What its writer calls: the cells of one range."""

    cells: Cells

    def __call__(self, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Samples of the cells from `first` on."""
        arrays = self.cells.arrays()
        for number in range(first, min(first + RANGE, self.cells.n_cells)):
            yield self.cells.cell(arrays, number)


def write_litdata(cells: Cells, path: Path) -> None:
    """Its chunks of 64 MB."""
    from litdata import optimize

    optimize(fn=Ranges(cells), inputs=list(range(0, cells.n_cells, RANGE)), output_dir=str(path), chunk_bytes="64MB",
             num_workers=1)


def begin_litdata(cells: Cells, path: Path) -> Epochs:
    """Its shuffle: chunks, then the cells within each."""
    from litdata import StreamingDataLoader, StreamingDataset

    dataset = StreamingDataset(str(path), shuffle=True, seed=0)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, collate_fn=joined,
                                 num_workers=0 if cells.cores == 1 else cells.cores)
    return lambda epoch: (Batch(*batch) for batch in loader)


# ---- slafdb


def write_slaf(cells: Cells, path: Path) -> None:
    """Its Lance tables."""
    from slaf.data import SLAFConverter

    SLAFConverter().convert(str(cells.h5ad), str(path))


def begin_slaf(cells: Cells, path: Path) -> Epochs:
    """Its "raw mode": tables of (cell, gene, value), cells mixed within what its scanners hold.

    An epoch is left at its last cell: the iterator would wait a minute for more.
    """
    from slaf import SLAFArray
    from slaf.ml import SLAFDataLoader

    stored = SLAFArray(str(path))
    stored.wait_for_metadata()

    def batches(epoch: int) -> Iterator[Batch]:
        n_left = cells.n_cells
        for batch in SLAFDataLoader(stored, batch_size=BATCH, raw_mode=True, verbose=False):
            table = batch["x"]
            n_cells = table["cell_integer_id"].n_unique()
            yield Batch(n_cells, table["gene_integer_id"].to_numpy(), table["value"].to_numpy())
            n_left -= n_cells
            if n_left <= 0:
                return

    return batches


PEERS = {
    "annbatch": Peer("annbatch", "annbatch[zarrs,numba]", "its shuffled Zarr collection; windows of 64 x 64 cells",
                     write_annbatch, begin_annbatch),
    "scDataset": Peer("scdataset", "scdataset", "the h5ad file; blocks of 16 cells, 64 batches mixed", write_nothing,
                      begin_scdataset),
    "bionemo-scdl": Peer("bionemo.scdl", "bionemo-scdl", "its mapped arrays; true random rows by get_row, joined",
                         write_scdl, begin_scdl),
    "mosaicml-streaming": Peer("streaming", "mosaicml-streaming", "its MDS samples; py1e shuffle, joined", write_mds,
                               begin_mds),
    "litdata": Peer("litdata", "litdata", "its chunks; cells mixed within a chunk, joined", write_litdata,
                    begin_litdata),
    "slafdb": Peer("slaf.ml", "slafdb[ml]", "its Lance table; raw mode, cells mixed within a window", write_slaf,
                   begin_slaf),
}


def main() -> None:
    """PEER FOLDER CELLS CORES SECONDS: print one line of JSON; 0 seconds: what an epoch holds, untimed.

    `PEER` alone: exit 0 where it can be imported, else tell why not.
    """
    warnings.simplefilter("ignore")
    peer = PEERS[sys.argv[1]]
    if sys.argv[2:] == []:
        if peer.module == "streaming":
            stub_torchvision()
        importlib.import_module(peer.module)
        return
    folder, n_cells, cores, seconds = sys.argv[2:]
    cells = Cells(Path(folder), int(n_cells), int(cores))
    path = cells.form(sys.argv[1].lower())
    if not path.exists():
        with made(path) as temporary:
            peer.write(cells, temporary)
    epochs = peer.begin(cells, path)
    print(json.dumps(timed(epochs, seconds=float(seconds)) if float(seconds) else seen(epochs)), flush=True)


if __name__ == "__main__":
    main()
