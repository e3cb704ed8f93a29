import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import feather, parquet

from data_pipeline import plan
from data_pipeline.sources import Source, json_lines, open_source, tables
from scgpt.errors import ConfigError, ScgptError, SourceError
from tests.data_pipeline.atlases import build_here, cells_of, config_of, random_counts, write_h5ad
from tests.data_pipeline.sources.formats import FIRST_ID, gene_names, lists_of, on_memory, vocab_of, write_vocab

COUNTS = random_counts(1, 60, 40)
LISTS = pa.list_(pa.int64())


def table_of(counts: Any, **options: Any) -> pa.Table:
    return pa.table(lists_of(counts, **options), pa.schema([("genes", LISTS), ("expressions", pa.list_(pa.float32()))]))


def write_ipc(path: Path, table: pa.Table, rows: int, open_writer: Callable[..., Any], compression: str | None) -> Path:
    with open_writer(path, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_parts(path: Path, table: pa.Table, rows: int) -> Path:
    path.mkdir()
    for number, first in enumerate(range(0, max(len(table), 1), 2 * rows)):
        parquet.write_table(table.slice(first, 2 * rows), path / f"part-{number:05d}.parquet", row_group_size=rows)
    return path


def write_dataset(path: Path, table: pa.Table, rows: int) -> Path:
    from datasets import Dataset, Features, disable_progress_bars

    disable_progress_bars()
    dataset = Dataset.from_dict(table.to_pydict(), features=Features.from_arrow_schema(table.schema))
    dataset.save_to_disk(path, num_shards=max(min(len(table) // rows, 3), 1))
    return path


FORMS: dict[str, Callable[[Path, pa.Table, int], Path]] = {
    "parquet": lambda path, table, rows: (parquet.write_table(table, path / "a.parquet", row_group_size=rows),
                                          path / "a.parquet")[1],
    "stream": lambda path, table, rows: write_ipc(path / "a.arrow", table, rows, pa.ipc.new_stream, None),
    "file": lambda path, table, rows: write_ipc(path / "a.arrow", table, rows, pa.ipc.new_file, "zstd"),
    "feather": lambda path, table, rows: (feather.write_feather(table, path / "a.feather", "lz4", chunksize=rows),
                                          path / "a.feather")[1],
    "parts": lambda path, table, rows: write_parts(path / "a", table, rows),
    "dataset": lambda path, table, rows: write_dataset(path / "a", table, rows),
}


def opened(form: str, folder: Path, table: pa.Table, rows: int = 7, n_genes: int = 40) -> Source:
    return open_source(FORMS[form](folder, table, rows), gene_table=str(write_vocab(folder / "vocab.json", n_genes)))


@pytest.mark.parametrize("form", FORMS)
def test_every_row_range_equals_the_matrix(tmp_path: Path, form: str) -> None:
    with opened(form, tmp_path, table_of(COUNTS)) as source:
        assert (source.kind, source.n_cells, source.n_genes) == ("lists", 60, 40)
        assert source.gene_names() == gene_names(40)
        for first, last in ((0, 60), (0, 1), (59, 60), (17, 33), (5, 5), (6, 8)):
            assert np.array_equal(source.read_rows(first, last).toarray(), COUNTS[first:last].toarray())
        assert source.value_offsets(0, 60)[[0, 60]].tolist() == [0, COUNTS.nnz]
        assert (np.diff(source.value_offsets(3, 44)) >= 0).all()


@settings(max_examples=30, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(0, 3).map(float)),
       st.sampled_from(sorted(set(FORMS) - {"dataset"})), st.integers(1, 5), st.booleans(), st.booleans(), st.data())
def test_any_matrix_reads_back(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, form: str, rows: int,
                               marker: bool, absent: bool, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    table = table_of(values, marker=marker, absent=absent)
    with opened(form, tmp_path_factory.mktemp("m"), table, rows, values.shape[1]) as source:
        assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])


@pytest.mark.parametrize(("genes", "expressions"), [
    (pa.list_(pa.uint16()), pa.list_(pa.uint8())), (pa.large_list(pa.int32()), pa.large_list(pa.float64())),
    (pa.list_(pa.uint64(), 2), pa.list_(pa.float16(), 2))])
def test_any_number_type_is_read(tmp_path: Path, genes: pa.DataType, expressions: pa.DataType) -> None:
    values = np.array([[1, 2], [3, 0], [0, 9]]).astype(np.float16)
    table = pa.table({"genes": pa.array([[FIRST_ID, 5]] * 3, genes),
                      "expressions": pa.array(list(values), expressions)})
    for form in ("parquet", "stream", "file"):
        (tmp_path / form).mkdir()
        with opened(form, tmp_path / form, table, rows=2, n_genes=2) as source:
            assert np.array_equal(source.read_rows(0, 3).toarray(), values)


def test_a_first_entry_without_expression_may_be_unknown(tmp_path: Path) -> None:
    genes = {name: number for name, number in vocab_of(gene_names(40)).items() if number >= FIRST_ID}   # no `<cls>`
    path = parquet.write_table(table_of(COUNTS, marker=True), tmp_path / "a.parquet") or tmp_path / "a.parquet"
    metadata = pa.table({"gene_symbol": list(genes), "ensembl_id": [f"ENSG{i:011d}" for i in range(40)],
                         "token_id": list(genes.values())})
    parquet.write_table(metadata, tmp_path / "gene_metadata.parquet")
    with open_source(path, gene_table=str(tmp_path / "gene_metadata.parquet")) as source:
        assert np.array_equal(source.read_rows(0, 60).toarray(), COUNTS.toarray())
        assert source.gene_columns() == ["index", "gene_symbol", "ensembl_id"]
        assert source.gene_names("ensembl_id")[:2] == ["ENSG00000000000", "ENSG00000000001"]


@pytest.mark.parametrize(("genes", "expressions", "message"), [
    ([[FIRST_ID, 9000]], [[1.0, 2.0]], "row 0 holds the id 9000"), ([[9000]], [[2.0]], "row 0 holds the id 9000"),
    ([[FIRST_ID], [FIRST_ID + 1, -5]], [[1.0], [1.0, -1.0]], "row 1 holds the id -5"),
    ([[FIRST_ID], [4, 5]], [[1.0], [1.0]], "row 1: 2 in genes, 1 in expressions"),
    ([None], [[1.0]], "row 0: None in genes"), ([None], [None], "row 0: None in genes")])
def test_lists_that_do_not_fit_are_named_by_row(tmp_path: Path, genes: Any, expressions: Any, message: str) -> None:
    table = pa.table({"genes": pa.array(genes, LISTS), "expressions": pa.array(expressions, pa.list_(pa.float32()))})
    with opened("parquet", tmp_path, table) as source, pytest.raises(SourceError, match=message):
        source.read_rows(0, len(table))


def test_negative_and_missing_expressions_of_genes_make_no_corpus(tmp_path: Path) -> None:
    for number, value in enumerate((-2.0, None)):
        folder = tmp_path / str(number)
        folder.mkdir()
        table = pa.table({"genes": pa.array([[FIRST_ID, 4]], LISTS),
                          "expressions": pa.array([[value, 3.0]], pa.list_(pa.float32()))})
        parquet.write_table(table, folder / "a.parquet")
        source = {"path": str(folder / "a.parquet"), "gene_table": str(write_vocab(folder / "vocab.json", 40))}
        with pytest.raises(SourceError, match="negative values|NaN"):
            build_here(config_of(source), folder / "out")


def test_obs_are_the_other_columns(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value, disable_progress_bars

    disable_progress_bars()
    lists = lists_of(COUNTS[:4])
    features = Features({"genes": List(Value("int64")), "expressions": List(Value("float32")),
                         "type": ClassLabel(names=["B cell", "T cell"]), "drug": Value("large_string")})
    Dataset.from_dict({**lists, "type": [1, 0, 1, None], "drug": ["a", None, "b", "a"]}, features).save_to_disk(
        tmp_path / "hf")
    vocab = str(write_vocab(tmp_path / "vocab.json", 40))
    with open_source(tmp_path / "hf", gene_table=vocab) as source:
        found = {name: column.to_pylist() for name, column in source.obs(source.obs_columns(), 1, 4).items()}
        assert found == {"type": ["B cell", "T cell", None], "drug": [None, "b", "a"]}
    table = table_of(COUNTS[:4]).append_column("share", pa.array([0.5, float("nan"), None, 1.0])).append_column(
        "word", pa.array(["x", "y", None, "x"]).dictionary_encode()).append_column("flag", pa.array([True] * 4))
    for form in ("parquet", "stream", "parts"):
        folder = tmp_path / form
        folder.mkdir()
        with opened(form, folder, table, rows=1) as source:
            assert source.obs(["share", "word", "flag"], 1, 4) == {
                "share": pa.array([None, None, 1.0]), "word": source.obs(["word"], 1, 4)["word"],
                "flag": pa.array([True] * 3)}
            assert source.obs(["word"])["word"].to_pylist() == ["x", "y", None, "x"]


def test_parts_may_differ_in_the_types_of_obs(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number, values in enumerate((pa.nulls(2), pa.array(["x", "y"]), pa.array(["y", "z"]).dictionary_encode())):
        table = table_of(COUNTS[2 * number:2 * number + 2]).append_column("drug", values)
        parquet.write_table(table, folder / f"{number}.parquet")
    vocab = str(write_vocab(tmp_path / "vocab.json", 40))
    with pytest.raises(SourceError, match="cannot be read"), open_source(folder, gene_table=vocab):
        pass
    parquet.write_table(table_of(COUNTS[4:6]).append_column("drug", pa.array(["y", "z"])), folder / "2.parquet")
    with open_source(folder, gene_table=vocab) as source:
        assert source.obs(["drug"])["drug"].to_pylist() == [None, None, "x", "y", "y", "z"]
        assert np.array_equal(source.read_rows(1, 5).toarray(), COUNTS[1:5].toarray())
    parquet.write_table(table_of(COUNTS[:2]), folder / "3.parquet")
    with pytest.raises(SourceError, match="3.parquet has other columns.*: drug"), open_source(folder, gene_table=vocab):
        pass


def test_dictionaries_that_change_between_batches_are_followed(tmp_path: Path) -> None:
    table = table_of(COUNTS[:6])
    schema = table.schema.append(pa.field("word", pa.dictionary(pa.int32(), pa.string())))
    with pa.ipc.new_stream(tmp_path / "a.arrow", schema) as writer:
        for first, words in ((0, ["a", "b"]), (2, ["c", "a"]), (4, ["b", "d"])):
            batch = table.slice(first, 2).combine_chunks().to_batches()[0]
            writer.write_batch(pa.record_batch([*batch.columns, pa.array(words).dictionary_encode()], schema=schema))
    with open_source(tmp_path / "a.arrow", gene_table=str(write_vocab(tmp_path / "vocab.json", 40))) as source:
        assert source.obs(["word"])["word"].to_pylist() == ["a", "b", "c", "a", "b", "d"]
        assert source.obs(["word"], 3, 5)["word"].to_pylist() == ["a", "b"]


@pytest.mark.parametrize("block_values", [200, 1 << 22])
def test_a_build_has_the_cells_of_the_same_h5ad(tmp_path: Path, block_values: int,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_VALUES", block_values)
    build_here(config_of(write_h5ad(tmp_path / "a.h5ad", COUNTS)), tmp_path / "expected")
    vocab = str(write_vocab(tmp_path / "vocab.json", 40))
    for form in ("parts", "stream"):
        (tmp_path / form).mkdir()
        path = FORMS[form](tmp_path / form, table_of(COUNTS, marker=True), 7)
        build_here(config_of({"path": str(path), "gene_table": vocab}), tmp_path / form / "corpus")
        assert cells_of(tmp_path / form / "corpus") == cells_of(tmp_path / "expected")


def write_bank(path: Path, form: str = "parquet", **tables_of: Any) -> Path:
    """As scGPT's DataBank.sync() writes it with on_disk_format parquet or json."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    path.mkdir()
    for name, counts in tables_of.items():
        n_cells = counts.shape[0]
        table = Dataset.from_dict({"id": list(range(n_cells)), "day": ["2024-01-01"] * n_cells, **lists_of(counts)})
        getattr(table, f"to_{form}")(str(path / f"{name}.datatable.{form}"))
    about = {"on_disk_format": form, "main_data": next(iter(tables_of)), "gene_vocab_md5": None}
    (path / "manifest.json").write_text(json.dumps(about, indent=2))
    (path / "studytable.json").write_text(json.dumps({"study_ids": None}))
    write_vocab(path / "gene_vocab.json", next(iter(tables_of.values())).shape[1])
    return path


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_an_scbank_folder_is_read_by_its_own_vocabulary(tmp_path: Path, form: str,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lines, "_PIECE_BYTES", 1000)
    path = write_bank(tmp_path / "heart.scb", form, X=COUNTS, spliced=random_counts(2, 60, 40))
    build_here(config_of(write_h5ad(tmp_path / "heart.h5ad", COUNTS)), tmp_path / "expected")
    build_here(config_of(path), tmp_path / "found")
    assert cells_of(tmp_path / "found") == cells_of(tmp_path / "expected")
    with open_source(path) as source:
        assert (source.kind, source.name, source.layer) == ("scbank", "heart", "X")
        assert source.other_matrices() == ["spliced"]
        assert source.obs(["id"], 2, 4)["id"].to_pylist() == [2, 3]
        assert source.obs(["day"], 2, 4)["day"].to_pylist() == ["2024-01-01"] * 2
    with open_source(path, layer="spliced") as source:
        assert np.array_equal(source.read_rows(0, 60).toarray(), random_counts(2, 60, 40).toarray())


@settings(max_examples=15, deadline=None)
@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.integers(0, 3).map(float)),
       st.integers(1, 300), st.data())
def test_any_matrix_reads_back_from_json(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray,
                                         piece_bytes: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(values)))
    last = data.draw(st.integers(first, len(values)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_lines, "_PIECE_BYTES", piece_bytes)
        with open_source(write_bank(tmp_path_factory.mktemp("b") / "a.scb", "json", X=values)) as source:
            assert np.array_equal(source.read_rows(first, last).toarray(), values[first:last])


@pytest.mark.parametrize(("text", "message"), [
    ("", "X.datatable.json is empty"), ("\n \n", "is empty"), ("{}", "no list column 'genes'"), ("[1, 2]", "cannot be"),
    ('{"genes": [3], "expressions": ["a"]}', "changed from .* to string"), ('{"genes": [3], "expressio', "JSON parse"),
    ('{"genes": ["A"], "expressions": [1.0]}', "changed from .* to string"), ('{"genes": [3]}', "no column 'express"),
    ('{"genes": [3], "expressions": [1, 2]}', "row 0: 1 in genes, 2 in expr"), ('{"genes": null, "expressions": null}',
                                                                           "row 0: None in genes")])
def test_json_that_is_no_table_is_told(tmp_path: Path, text: str, message: str) -> None:
    path = write_bank(tmp_path / "a.scb", "json", X=COUNTS)
    (path / "X.datatable.json").write_text(text)
    with pytest.raises(SourceError, match=message), open_source(path) as source:
        source.read_rows(0, source.n_cells)


def test_what_is_missing_of_a_table_is_told(tmp_path: Path) -> None:
    parquet.write_table(table_of(COUNTS), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="gene ids, not what they stand for.*gene_table: vocab.json"):
        open_source(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="kind h5ad names its genes itself"):
        open_source(write_h5ad(tmp_path / "a.h5ad", COUNTS), gene_table="scgpt-human")
    bank = write_bank(tmp_path / "a.scb", X=COUNTS, raw=COUNTS)
    with pytest.raises(ConfigError, match="no layer 'Y'.*choose layer: X or raw"):
        open_source(bank, layer="Y")
    (bank / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="several tables, and names no main one"):
        open_source(bank)
    (bank / "gene_vocab.json").unlink()
    with pytest.raises(SourceError, match="it holds no gene_vocab.json"):
        open_source(bank)
    (tmp_path / "b.scb").mkdir()
    with pytest.raises(SourceError, match="it holds no table"):
        open_source(tmp_path / "b.scb")


def test_a_dictionary_of_datasets_names_its_splits(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    part = Dataset.from_dict(lists_of(COUNTS))
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "all")
    vocab = str(write_vocab(tmp_path / "vocab.json", 40))
    with pytest.raises(SourceError, match="data sets: train, test.*all/train"):
        open_source(tmp_path / "all", gene_table=vocab)
    with open_source(tmp_path / "all" / "train", gene_table=vocab) as source:
        assert source.n_cells == 60


@pytest.mark.parametrize("form", ["parts", "stream", "file", "dataset"])
def test_tables_behind_a_url_read_the_same(tmp_path: Path, form: str) -> None:
    table = table_of(COUNTS).append_column("word", pa.array(["x", "y", None] * 20).dictionary_encode())
    path = FORMS[form](tmp_path, table, 7)
    with on_memory(path) as url, open_source(url, gene_table=str(write_vocab(tmp_path / "v.json", 40))) as source:
        assert np.array_equal(source.read_rows(17, 44).toarray(), COUNTS[17:44].toarray())
        assert source.obs(["word"], 58)["word"].to_pylist() == ["y", None]


WRONG_TABLES = {
    "no lists": (pa.table({"genes": [1, 2], "expressions": [1.0, 2.0]}), "no list column 'genes'|holds int64"),
    "words": (pa.table({"genes": [["CD3D"]], "expressions": [[1.0]]}), "'genes' holds list<.*string>"),
    "no expressions": (pa.table({"genes": [[1]]}), "no column 'expressions'"),
    "no genes": (pa.table({"expressions": [[1.0]]}), "column 'genes'"),
}


@pytest.mark.parametrize("name", ["genes", "tissue"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str) -> None:
    columns = [*table_of(COUNTS).columns, pa.array(["a"] * 60), pa.array(["b"] * 60)]
    table = pa.Table.from_arrays(columns, names=["genes", "expressions", "tissue", name])
    with pytest.raises(SourceError, match=f"two columns are named '{name}'"):
        opened("parquet", tmp_path, table)


def test_a_missing_gene_is_told_with_its_row(tmp_path: Path) -> None:
    lists = lists_of(COUNTS)
    lists["genes"][3][1] = None
    with opened("parquet", tmp_path, pa.table(lists)) as source, \
            pytest.raises(SourceError, match="row 3 lacks the id of a gene"):
        source.read_rows(0, 60)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("state.json", '{"_data_files": [{"filename": "../../b.arrow"}]}', "'../../b.arrow', which the folder does not"),
    ("state.json", "[1]", "not a JSON object"), ("dataset_dict.json", '{"splits": []}', "data sets: none")])
def test_a_folder_of_datasets_that_says_nonsense_is_told(tmp_path: Path, name: str, content: str,
                                                         message: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path / "a", kind="lists", gene_table=str(write_vocab(tmp_path / "vocab.json", 40)))


@pytest.mark.parametrize(("manifest", "message"), [('{"main_data": ["X"]}', None), ("[]", "not a JSON object")])
def test_a_manifest_of_a_bank_that_says_nonsense_is_told(tmp_path: Path, manifest: str, message: str | None) -> None:
    bank = write_bank(tmp_path / "a.scb", X=COUNTS)
    (bank / "manifest.json").write_text(manifest)
    if message is None:   # there is only one table
        with open_source(bank) as source:
            assert source.n_cells == 60
        return
    with pytest.raises(SourceError, match=message):
        open_source(bank)


@pytest.mark.parametrize("form", ["parquet", "stream"])
@pytest.mark.parametrize("fault", WRONG_TABLES)
def test_other_tables_are_refused_with_their_columns(tmp_path: Path, form: str, fault: str) -> None:
    table, message = WRONG_TABLES[fault]
    with pytest.raises(SourceError, match=message):
        opened(form, tmp_path, table)


@pytest.mark.parametrize("form", ["parquet", "stream", "file"])
def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path: Path, form: str) -> None:
    with opened(form, tmp_path, table_of(COUNTS)) as source:
        path = source.path.path
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) // 2, len(content) - 30, *range(len(content) - 4000, len(content) - 500, 250)):
        path.write_bytes(content[:size])
        with pytest.raises(SourceError, match="cannot be read"), \
                open_source(path, gene_table=str(tmp_path / "vocab.json")) as source:
            source.read_rows(0, source.n_cells)


def test_a_file_that_changes_is_read_anew(tmp_path: Path) -> None:
    for counts in (COUNTS, random_counts(5, 33, 40)):
        with opened("parquet", tmp_path, table_of(counts)) as source:
            assert np.array_equal(source.read_rows(0, source.n_cells).toarray(), counts.toarray())
    assert tables.open_table.cache_info().maxsize is not None


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["parquet", "stream", "file", "json"]), st.integers(0, 2**31), st.integers(1, 20))
def test_random_bytes_in_a_file_give_an_error_or_values(tmp_path_factory: pytest.TempPathFactory, form: str, seed: int,
                                                        n_bytes: int) -> None:
    folder = tmp_path_factory.mktemp("g")
    counts = random_counts(1, 30, 20)
    bank = write_bank(folder / "a.scb", "json", X=counts) if form == "json" else None
    path = FORMS[form](folder, table_of(counts), 7) if bank is None else bank / "X.datatable.json"
    draw = np.random.default_rng(seed)
    content = bytearray(path.read_bytes())
    for place in draw.integers(0, len(content), n_bytes):
        content[place] = draw.integers(256)
    path.write_bytes(content)
    try:
        with open_source(bank or path, gene_table=str(write_vocab(folder / "vocab.json", 20))) as source:
            rows = source.read_rows(0, source.n_cells)
            assert rows.shape == (source.n_cells, 20)
    except ScgptError as error:
        assert str(bank or path) in str(error)  # noqa: PT017 some damage does not show
