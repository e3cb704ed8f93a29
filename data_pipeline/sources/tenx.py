"""10x Genomics: Cell Ranger's `.h5` files, v2 (a group a genome) and v3 (one group, `matrix`, with features).

The matrix is features x cells, stored by columns: its cells are the rows of a CSR matrix as it stands. Features that
are no genes (antibodies, guides, peaks), and the genes of another genome, are left out and told.
"""
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import h5py
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.sparse import csr_array
from typing_extensions import override

from data_pipeline.sources.base import AUTO, INDEX, Source, X
from data_pipeline.sources.compressed import StoredMatrix, keep_columns
from data_pipeline.sources.elements import chunk_bytes
from data_pipeline.sources.faults import reading
from data_pipeline.sources.h5ad import open_hdf5
from data_pipeline.sources.location import Location
from scgpt.counted import counted
from scgpt.errors import ConfigError, SourceError

BARCODE = "barcode"                      # the only thing that the format knows of a cell
GENE_IDS = "gene_ids"
EXPRESSION = "Gene Expression"          # the feature type that is read
_HUMAN = re.compile(r"(?:.*[-_])?(?:grch\d+|hg\d+|b37|t2t|chm13|human|homo_sapiens)(?:[-_.].*)?", re.IGNORECASE)
_V2_PARTS = {"barcodes", "data", "genes", "gene_names", "indices", "indptr", "shape"}
_V3_GROUP = "matrix"
_V3_PARTS = {"barcodes", "data", "features", "indices", "indptr", "shape"}


@dataclass(frozen=True, slots=True)
class Features:
    """The features of a matrix, and which of them are the genes in use."""

    genes: dict[str, list[str]]          # INDEX (symbols), GENE_IDS and others -> (n_genes,)
    n_features: int
    places: NDArray[np.int32] | None     # (features,)  place among the genes, -1: left out; None: all are genes
    left_out: Counter[str]               # why -> features

    @property
    def n_genes(self) -> int:
        """Genes in use."""
        return len(self.genes[INDEX])

    @classmethod
    def choose(cls, names: dict[str, list[str]], types: Sequence[str], genomes: Sequence[str],
               genome: str | None) -> "Features":
        """Keep the genes of one genome.

        Args:
            names: what identifies the features, (features,) each.
            types: their feature types, (features,), or empty where the format knows only genes.
            genomes: their genomes, (features,), or empty where there is one.
            genome: the one in use; None: all.
        """
        n_features = len(names[INDEX])
        _check_numbers(n_features, *names.values(), *filter(None, (types, genomes)))
        kept = np.ones(n_features, bool)
        left_out: Counter[str] = Counter()
        for values, wanted in ((types, EXPRESSION), (genomes, genome)):
            if values and wanted is not None:
                others = np.array([value != wanted for value in values])
                left_out.update(values[place] for place in np.flatnonzero(kept & others).tolist())
                kept &= ~others
        if kept.all():
            return cls(names, n_features, None, left_out)
        places = np.where(kept, np.cumsum(kept) - 1, -1).astype(np.int32)
        genes = {key: [_bare(values[place], genome) for place in np.flatnonzero(kept)]
                 for key, values in names.items()}
        return cls(genes, n_features, places, left_out)

    def rows(self, rows: csr_array) -> csr_array:
        """(cells, features) -> (cells, n_genes)."""
        return rows if self.places is None else keep_columns(rows, self.places, self.n_genes)


class TenxSource(Source):
    """What both kinds have in common: features, barcodes."""

    features: Features

    @override
    def gene_columns(self) -> list[str]:
        return list(self.features.genes)

    @override
    def _names_in(self, column: str) -> list[str]:
        return self.features.genes[column]

    @override
    def obs_columns(self) -> list[str]:
        return [BARCODE]

    @override
    def stored_share(self) -> float:
        return 1.0

    @override
    def remarks(self) -> list[str]:
        left_out = sorted(self.features.left_out.items())
        return [f"{counted(count, 'feature')} of '{kind}' left out" for kind, count in left_out]


class TenxH5(TenxSource):
    """A Cell Ranger HDF5 file: a group a genome (v2), or one group `matrix` (v3)."""

    def __init__(self, file: h5py.File, path: Location, name: str, layer: str, close: Callable[[], None]) -> None:
        self.path, self.name, self._close = path, name, close
        with reading(path, "header"):
            groups = _groups(file)
            if not groups:
                raise SourceError(f"HDF5, but not of Cell Ranger: it holds {', '.join(sorted(file)[:8]) or 'nothing'}",
                                  where=str(path), fix="say what it is: kind: h5ad" if {"obs", "var"} <= set(file) else
                                                       "give a file such as filtered_feature_bc_matrix.h5")
            self._genomes = _genomes_of(file[_V3_GROUP]) if groups == [_V3_GROUP] else groups
            genome = _choose_genome(self._genomes, layer, path)
            self.layer = X if genome is None else genome
            self._group = file[_V3_GROUP if groups == [_V3_GROUP] else genome or groups[0]]
            self.features = _features(self._group, genome)
            n_features, self.n_cells = _shape_of(self._group)
            self.n_genes = self.features.n_genes
            self._rows = StoredMatrix(self._group["data"], self._group["indices"], self._group["indptr"], self.n_cells,
                                      n_features, "column")
            self._rows.check()
            check_sizes(n_features, self.n_cells, self.features, int(self._group["barcodes"].shape[0]))

    @classmethod
    def open(cls, location: Location, *, name: str, layer: str = AUTO) -> "TenxH5":
        """Open a file and choose its genome: the one there is, else the human one, else the one named by `layer`."""
        file, close = open_hdf5(location, fix="give a Cell Ranger .h5 file")
        try:
            return cls(file, location, name, layer, close)
        except BaseException:
            close()
            raise

    @override
    def close(self) -> None:
        self._close()

    @override
    def other_matrices(self) -> list[str]:
        return [genome for genome in self._genomes if len(self._genomes) > 1 and genome != self.layer]

    @override
    def obs(self, columns: Sequence[str], first: int = 0, last: int | None = None) -> dict[str, pa.Array]:
        with reading(self.path, "barcodes"):
            last = self.n_cells if last is None else last
            return {name: pa.array(_words(self._group["barcodes"][first:last]), pa.string()) for name in columns}

    @override
    def value_offsets(self, first: int, last: int) -> NDArray[np.int64]:
        with reading(self.path, f"rows {first} to {last}"):
            return self._rows.offsets(first, last)

    @override
    def bytes_per_value(self) -> int:
        return self._rows.bytes_per_value

    @property
    @override
    def chunk_bytes(self) -> int:
        return chunk_bytes(self._rows.data) + chunk_bytes(self._rows.indices)

    @override
    def read_rows(self, first: int, last: int) -> csr_array:
        with reading(self.path, f"rows {first} to {last}"):
            return self.features.rows(self._rows.rows(first, last))


def _check_numbers(n_features: int, *told: Sequence[str]) -> None:
    if any(len(values) != n_features for values in told):
        raise ValueError("names, types or genomes of features of unequal number")


def check_sizes(n_rows: int, n_cells: int, features: Features, n_barcodes: int) -> None:
    """Raise ValueError unless a matrix of n_rows x n_cells has as many features and barcodes."""
    if (n_rows, n_cells) != (features.n_features, n_barcodes):
        raise ValueError(f"a matrix of {n_rows} x {n_cells} with {features.n_features} features and {n_barcodes} "
                         "barcodes")


def _groups(file: h5py.File) -> list[str]:
    """The group of v3, or those of v2, in the order of the file."""
    parts = {name: set(group) for name, group in file.items() if isinstance(group, h5py.Group)}
    if parts.get(_V3_GROUP, set()) >= _V3_PARTS:
        return [_V3_GROUP]
    return [name for name, present in parts.items() if present >= _V2_PARTS]


def _genomes_of(group: h5py.Group) -> list[str]:
    """The genomes that the genes of a v3 file name, [X] where they name none."""
    features = group["features"]
    if "genome" not in features or not features["genome"].shape:
        return [X]
    genomes = _words(features["genome"][:])
    types = _words(features["feature_type"][:]) if "feature_type" in features else [EXPRESSION] * len(genomes)
    _check_numbers(len(genomes), types)
    present = dict.fromkeys(genome for genome, kind in zip(genomes, types, strict=True) if kind == EXPRESSION)
    return list(present) or [X]


def _choose_genome(genomes: list[str], layer: str, path: Location) -> str | None:
    """The genome in use; None where there is only one."""
    if len(genomes) == 1 and layer in {AUTO, X, genomes[0]}:
        return None
    if layer in genomes:
        return layer
    human = [genome for genome in genomes if _HUMAN.fullmatch(genome)]
    if layer == AUTO and len(human) == 1:
        return human[0]
    what = f"it holds several genomes: {', '.join(genomes)}" if layer == AUTO else f"there is no layer '{layer}'"
    choices = genomes if len(genomes) > 1 else [X]
    raise ConfigError(what, where=str(path), fix=f"choose one (layer: {' or '.join(choices)})")


def _features(group: h5py.Group, genome: str | None) -> Features:
    if "features" not in group:   # v2: the group is the genome
        return Features.choose({INDEX: _words(group["gene_names"][:]), GENE_IDS: _words(group["genes"][:])}, [], [],
                               None)
    held = group["features"]
    names = {INDEX: _words(held["name"][:]), GENE_IDS: _words(held["id"][:])}
    names |= {key: _words(held[key][:]) for key in held if isinstance(held[key], h5py.Dataset)
              and held[key].shape == held["id"].shape and held[key].dtype.kind in "SO"
              and key not in {"name", "id", "feature_type", "genome"}}   # gene_id, gene_name of probes
    types = _words(held["feature_type"][:]) if "feature_type" in held else []
    genomes = _words(held["genome"][:]) if genome is not None else []
    return Features.choose(names, types, genomes, genome)


def _shape_of(group: h5py.Group) -> tuple[int, int]:
    """(features, cells)."""
    held = group["shape"]
    if held.shape != (2,) or held.dtype.kind not in "ui":
        raise ValueError("a shape that is not two integers")
    return int(held[0]), int(held[1])


def _bare(name: str, genome: str | None) -> str:
    """A name without its genome, which Cell Ranger puts before it where there are several."""
    return name if genome is None else re.sub(rf"^{re.escape(genome)}_+", "", name)


def _words(values: NDArray[np.generic]) -> list[str]:
    return [value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in values.tolist()]
