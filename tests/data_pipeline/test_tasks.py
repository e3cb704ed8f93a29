from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from data_pipeline import plan as planning
from data_pipeline.genes import match_genes
from scgpt.data import TokenDataset, verify_corpus
from scgpt.errors import SourceError
from tests.data_pipeline.atlases import (
    BLOOD,
    CHR21,
    GENES,
    VOCAB,
    Here,
    build_here,
    bytes_of,
    cells_of,
    config_of,
    random_counts,
    write_h5ad,
)


def expected_cells(name: str, matrix: sparse.csr_matrix, genes: list[str]) -> dict[tuple[str, int], dict[int, float]]:
    tokens = match_genes(genes, VOCAB).tokens
    return {(name, row): dict(sorted(zip(tokens[part.indices].tolist(), part.data.tolist(), strict=True)))
            for row, part in enumerate(matrix)}


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_matrix.toarray],
                         ids=["csr", "csc", "dense"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_cell_arrives_exactly_once_with_its_values(tmp_path: Path, form: object, shuffle: bool,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 700)
    counts = random_counts(5, 300, 40)
    genes = GENES[5000:9000:100]
    path = write_h5ad(tmp_path / "a.h5ad", form(counts), genes)  # type: ignore[operator]
    config = config_of(path, splits={"valid": 0.2}, shards={"max_bytes": "4KiB", "shuffle": shuffle})
    manifest = build_here(config, tmp_path / "out")
    assert verify_corpus(tmp_path / "out", deep=True) == manifest
    assert cells_of(tmp_path / "out") == expected_cells("a", counts, genes)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    assert len(shards) > 3
    assert max(shard.bytes for shard in shards) <= 1.3 * 4096 + 1500   # a few cells more, and the headers
    assert manifest.splits["valid"].cells == pytest.approx(60, abs=25)


def test_the_order_of_the_sources_is_kept_unshuffled_and_lost_shuffled(tmp_path: Path) -> None:
    for shuffle in (True, False):
        out = tmp_path / str(shuffle)
        build_here(config_of(BLOOD, CHR21, splits={"valid": 0.0}, shards={"shuffle": shuffle}), out)
        ids = TokenDataset.open(out).obs(["source_row"]).column(0).to_numpy()
        steps = np.diff(ids)
        assert ((steps > 0).mean() > 0.99) == (not shuffle)


@pytest.mark.parametrize("block_values", [3000, 50_000])
def test_the_bytes_depend_neither_on_the_order_of_the_tasks_nor_on_what_was_done_before(
        tmp_path: Path, block_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", block_values)
    config = config_of(BLOOD, CHR21, shards={"max_bytes": "256KiB"})
    build_here(config, tmp_path / "first")
    build_here(config, tmp_path / "second", workers=Here(seed=1))
    build_here(config, tmp_path / "third", workers=Here(seed=2))
    assert bytes_of(tmp_path / "first") == bytes_of(tmp_path / "second") == bytes_of(tmp_path / "third")


def test_a_rerun_does_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 20_000)
    config = config_of(BLOOD)

    class Interrupted(Here):
        def run(self, stage: str, *rest: object) -> list[dict[str, object]]:
            if stage == "merge":
                raise KeyboardInterrupt
            return super().run(stage, *rest)  # type: ignore[arg-type]

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_here(config, out, workers=Interrupted())
    runs = sorted((out / ".build" / "runs").iterdir())
    times = [run.stat().st_mtime_ns for run in runs]
    damaged = runs[3]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    kept = {run: time for run, time in zip(runs, times, strict=True) if run != damaged}
    done_again = []

    class Watching(Here):
        def run(self, stage: str, *rest: object) -> list[dict[str, object]]:
            results = super().run(stage, *rest)  # type: ignore[arg-type]
            if stage == "tokenise":
                done_again.extend(run for run in runs if run.stat().st_mtime_ns != kept.get(run))
            return results

    build_here(config, out, workers=Watching())
    assert done_again == [run for run in runs if run.name.startswith(damaged.name.partition(".")[0])]
    assert damaged in done_again
    build_here(config, tmp_path / "whole")
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_fault_in_the_middle_leaves_no_corpus_and_names_the_row(tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "BLOCK_VALUES", 700)
    monkeypatch.setattr("data_pipeline.sources.base.PROBE_VALUES", 100)
    counts = random_counts(5, 300, 40)
    counts.data[counts.indptr[250]] = -2
    path = write_h5ad(tmp_path / "poor.h5ad", counts)
    with pytest.raises(SourceError, match="row 250 holds -2"):
        build_here(config_of(path), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_filtered_cells_are_counted_by_reason_and_make_shards_smaller(tmp_path: Path) -> None:
    loose = build_here(config_of(CHR21, cells={"min_genes": 1}), tmp_path / "loose")
    strict = build_here(config_of(CHR21, cells={"min_genes": 20, "min_counts": 25}), tmp_path / "strict")
    source = strict.sources[0]
    assert source.cells_in == source.cells_written + sum(source.filtered.values()) == 1107
    assert set(source.filtered) == {"min_genes", "min_counts"}
    assert strict.splits["train"].tokens < loose.splits["train"].tokens
    kept, all_cells = cells_of(tmp_path / "strict"), cells_of(tmp_path / "loose")
    for key, cell in all_cells.items():
        assert (key in kept) == (len(cell) >= 20 and sum(cell.values()) >= 25)


def test_a_filter_that_keeps_no_cell_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no cell is left: min_genes 700"):
        build_here(config_of(BLOOD, cells={"min_genes": 10_000}), tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_metadata_of_each_cell_are_those_of_its_row(tmp_path: Path) -> None:
    import anndata

    build_here(config_of(BLOOD, CHR21, columns=["cell_type", "phase", "n_genes"]), tmp_path / "out")
    atlas = anndata.read_h5ad(BLOOD).obs
    for row in TokenDataset.open(tmp_path / "out").obs().to_pylist():
        mine = atlas.iloc[row["source_row"]] if row["source"] == BLOOD.stem else {}
        for column in ("cell_type", "phase", "n_genes"):
            assert row[column] == (str(mine[column]) if column in mine else None)


@pytest.mark.parametrize(("largest", "kind", "expected"), [
    (65_535, "counts", "uint16"), (65_536, "counts", "uint32"), (0.5, "normalized", "float32")])
def test_one_type_of_values_fits_the_whole_corpus(tmp_path: Path, largest: float, kind: str, expected: str) -> None:
    counts = random_counts(6, 60, 30)
    counts.data[-1] = largest
    path = write_h5ad(tmp_path / "a.h5ad", counts)
    build_here(config_of(path, cells={"expression_kind": kind}, splits={"valid": 0.0}), tmp_path / "out")
    dataset = TokenDataset.open(tmp_path / "out")
    assert str(dataset[0]["expressions"].dtype) == expected
    assert dataset.manifest.expression_kind == kind
    assert max(max(cell.values()) for cell in cells_of(tmp_path / "out").values()) == max(largest, counts.data.max())
