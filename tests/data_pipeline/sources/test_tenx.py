import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from data_pipeline.genes import map_source
from data_pipeline.sources import open_source
from scgpt.errors import ConfigError, ScgptError, SourceError
from tests.data_pipeline.atlases import VOCAB, build_here, cells_of, config_of, random_counts, spoil, write_h5ad
from tests.data_pipeline.sources.formats import gene_names, on_memory, write_tenx_h5, write_tenx_v2

needs_shared = pytest.mark.skipif("SCGPT_SHARED" not in os.environ,
                                  reason="SCGPT_SHARED names no folder with the shared data")
COUNTS = random_counts(1, 60, 40)


def shared(name: str) -> Path:
    return Path(os.environ["SCGPT_SHARED"]) / "data" / "formats" / name


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(0, 3).map(float)),
       st.booleans(), st.data())
def test_any_matrix_reads_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, v2: bool,
                               data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("m") / "a.h5"
    path = write_tenx_v2(path, {"GRCh38": values}) if v2 else write_tenx_h5(path, values)
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    with open_source(path) as source:
        assert (source.kind, source.n_cells, source.n_genes) == ("10x_h5", *values.shape)
        assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])
        exact = np.concatenate([[0], np.cumsum((values > 0).sum(axis=1))])
        assert np.array_equal(source.value_offsets(first, last), exact[first:last + 1])
        assert source.obs(["barcode"], first, last)["barcode"].to_pylist() == [f"AAAC{i}-1" for i in range(first, last)]


def test_only_gene_expression_is_read_and_the_rest_is_told(tmp_path: Path) -> None:
    types = ["Antibody Capture" if i % 3 == 0 else "Gene Expression" for i in range(40)]
    genes = [i for i in range(40) if i % 3]
    genomes = ["" if i % 3 == 0 else "GRCh38" for i in range(40)]   # as Cell Ranger leaves it for antibodies
    with open_source(write_tenx_h5(tmp_path / "a.h5", COUNTS, types=types, genomes=genomes)) as source:
        assert (source.n_genes, source.layer) == (len(genes), "X")
        assert np.array_equal(source.read_rows(5, 50).toarray(), COUNTS[5:50][:, genes].toarray())
        assert source.gene_names() == [gene_names(40)[i] for i in genes]
        assert source.gene_names("gene_ids") == [f"id{i}" for i in genes]
        assert source.remarks() == ["14 features of 'Antibody Capture' left out"]


def test_the_human_genome_of_several_is_chosen(tmp_path: Path) -> None:
    mouse = random_counts(2, 60, 30)
    path = write_tenx_v2(tmp_path / "v2.h5", {"mm10": mouse, "hg19": COUNTS}, {"mm10": [f"Gene{i}" for i in range(30)]})
    with open_source(path) as source:
        assert (source.layer, source.other_matrices(), source.n_genes) == ("hg19", ["mm10"], 40)
        assert np.array_equal(source.read_rows(0, 60).toarray(), COUNTS.toarray())
    with open_source(path, layer="mm10") as source:
        assert np.array_equal(source.read_rows(3, 9).toarray(), mouse[3:9].toarray())
    genomes = ["GRCh38" if i % 2 else "mm10" for i in range(40)]
    names = [f"{genome}_{name}" for genome, name in zip(genomes, gene_names(40), strict=True)]
    with open_source(write_tenx_h5(tmp_path / "v3.h5", COUNTS, genomes=genomes, symbols=names)) as source:
        assert (source.layer, source.gene_names()) == ("GRCh38", gene_names(40)[1::2])
        assert np.array_equal(source.read_rows(0, 60).toarray(), COUNTS[:, 1::2].toarray())
        assert source.remarks() == ["20 features of 'mm10' left out"]


def test_genomes_without_a_choice_are_named(tmp_path: Path) -> None:
    path = write_tenx_v2(tmp_path / "a.h5", {"mm10": COUNTS, "rn6": COUNTS})
    with pytest.raises(ConfigError, match=r"several genomes: mm10, rn6.*layer: mm10 or rn6"):
        open_source(path)
    with pytest.raises(ConfigError, match="no layer 'hg19'"):
        open_source(path, layer="hg19")


def test_a_build_has_the_cells_of_the_same_h5ad(tmp_path: Path) -> None:
    build_here(config_of(write_h5ad(tmp_path / "a.h5ad", COUNTS)), tmp_path / "expected")
    path = write_tenx_h5(tmp_path / "a.h5", COUNTS)
    manifest = build_here(config_of({"path": str(path), "columns": {"donor": "barcode"}}), tmp_path / "found")
    assert cells_of(tmp_path / "found") == cells_of(tmp_path / "expected")
    assert manifest.sources[0].cells_in == 60


def test_a_file_behind_a_url_reads_the_same(tmp_path: Path) -> None:
    with on_memory(write_tenx_h5(tmp_path / "a.h5", COUNTS)) as url, open_source(url) as source:
        assert (source.kind, source.name) == ("10x_h5", "a")
        assert np.array_equal(source.read_rows(17, 44).toarray(), COUNTS[17:44].toarray())


BAD = {
    "not 10x": (lambda path: write_h5ad(path, COUNTS), "not of Cell Ranger: it holds"),
    "not HDF5": (lambda path: path.write_text("hello"), "not an HDF5 file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-3000]), "damaged|cannot be read"),
    "features": (lambda path: spoil(path, "matrix/features/id", lambda ids: ids[:-1]), "unequal number"),
    "sizes": (lambda path: spoil(path, "matrix/shape", lambda shape: shape + 1), "boundaries"),
    "barcodes": (lambda path: spoil(path, "matrix/barcodes", lambda codes: codes[:-1]), "40 features and 59 barcodes"),
    "rows": (lambda path: spoil(path, "matrix/indptr", lambda p: np.where(p == p[30], 10**9, p)), "boundaries"),
    "columns": (lambda path: spoil(path, "matrix/indices", lambda i: i + 30), "column index outside the 40"),
    "values": (lambda path: spoil(path, "matrix/data", lambda d: d[:-5]), "values, .* indices"),
    "one number": (lambda path: spoil(path, "matrix/data", lambda d: d[0]), "'data' is no list of numbers"),
    "shape": (lambda path: spoil(path, "matrix/shape", lambda s: s[[0, 1, 1]]), "a shape that is not two integers"),
    "types": (lambda path: spoil(path, "matrix/features/feature_type", lambda t: t[:-5]), "features of unequal number"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_damaged_file_is_one_sentence_with_its_place(tmp_path: Path, fault: str) -> None:
    path = write_tenx_h5(tmp_path / "poor.h5", COUNTS)
    damage, message = BAD[fault]
    damage(path)
    with pytest.raises(SourceError, match=message) as caught, open_source(path) as source:
        source.read_rows(0, source.n_cells)
    assert "poor.h5" in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=40, deadline=None, derandomize=True)   # some damage of the heap makes libhdf5 itself hang
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_random_bytes_in_a_file_give_an_error_or_values(tmp_path_factory: pytest.TempPathFactory, seed: int,
                                                        n_bytes: int) -> None:
    path = write_tenx_h5(tmp_path_factory.mktemp("g") / "a.h5", random_counts(1, 30, 20))
    draw = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for place in draw.integers(0, len(content), n_bytes):
        content[place] = draw.integers(256)
    path.write_bytes(content)
    try:
        with open_source(path) as source:
            rows = source.read_rows(0, source.n_cells)
            assert rows.shape == (source.n_cells, len(source.gene_names()))
    except ScgptError as error:
        assert str(path) in str(error)  # noqa: PT017 some damage does not show


@needs_shared
def test_the_real_files_of_both_versions_hold_the_same_cells() -> None:
    with open_source(shared("10x_h5/cellranger-3.0.0_filtered_feature_bc_matrix.h5")) as file, \
            open_source(shared("10x_mtx/cellranger-3.0.0_filtered_feature_bc_matrix")) as folder:
        assert (file.n_cells, file.n_genes, file.gene_names()) == (1107, 507, folder.gene_names())
        assert np.array_equal(file.read_rows(0, 1107).toarray(), folder.read_rows(0, 1107).toarray())
        assert file.obs(["barcode"], 3, 9) == folder.obs(["barcode"], 3, 9)
    with open_source(shared("10x_h5/cellranger-1.2.0_multiple_genomes.h5")) as file, \
            open_source(shared("10x_mtx/cellranger-1.2.0_hg19_chr21")) as folder:
        assert (file.layer, file.other_matrices()) == ("hg19_chr21", ["another_genome"])
        assert np.array_equal(file.read_rows(0, 12).toarray(), folder.read_rows(0, 12).toarray())
    with h5py.File(shared("10x_h5/visium-1.0.0_filtered_feature_bc_matrix.h5")) as held, \
            open_source(shared("10x_h5/visium-1.0.0_filtered_feature_bc_matrix.h5")) as file:
        expected = sparse.csc_matrix(tuple(held["matrix"][key][:] for key in ("data", "indices", "indptr")), (100, 100))
        assert np.array_equal(file.read_rows(0, 100).toarray(), expected.toarray().T)


@needs_shared
@pytest.mark.parametrize("name", ["10x_h5/scprep_v2_mouse-genes-labelled-GRCh38.h5", "10x_h5/scprep_v3_mouse-genes.h5",
                                  "10x_h5/visium-2.1.0_raw_probe_bc_matrix.h5", "10x_mtx/scprep_v2_mouse"])
def test_the_real_mouse_files_are_refused_as_mouse(name: str) -> None:
    with open_source(shared(name)) as source, pytest.raises(SourceError, match="these are mouse genes"):
        map_source(source, VOCAB, min_gene_overlap=0.3)


def test_chunks_that_were_never_written_are_no_zeros(tmp_path: Path) -> None:
    for key in ("data", "indices"):
        path = write_tenx_h5(tmp_path / f"{key}.h5", COUNTS)
        with h5py.File(path, "r+") as file:
            values = file[f"matrix/{key}"][:]
            del file[f"matrix/{key}"]
            array = file["matrix"].create_dataset(key, shape=values.shape, dtype=values.dtype, chunks=(50,))
            array[:200] = values[:200]
        with open_source(path) as source, pytest.raises(SourceError, match="chunks? of its .* (is|are) missing"):
            source.read_rows(0, 60)


def test_an_h5ad_file_of_another_name_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="not of Cell Ranger.*say what it is: kind: h5ad"):
        open_source(write_h5ad(tmp_path / "a.h5", COUNTS))
