from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from scgpt.data import TokenDataset
from scgpt.data.content import content_hashes
from scgpt.data.schema import RaggedBatch, offsets_of
from scgpt.data.verify import verify_cells
from scgpt.errors import DataError
from tests.scgpt.data.cells import random_cells, write_corpus

MASK, GOLDEN = (1 << 64) - 1, 0x9E3779B97F4A7C15


def batch_of(cells: list[dict[int, float]], kind: type[np.generic] = np.float32) -> RaggedBatch:
    ordered = [sorted(cell.items()) for cell in cells]
    pairs = [pair for cell in ordered for pair in cell]
    return RaggedBatch(np.array([gene for gene, _ in pairs], np.uint16), np.array([value for _, value in pairs], kind),
                       offsets_of(np.array([len(cell) for cell in ordered])))


def slow_mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def slow_hash(cell: dict[int, float]) -> tuple[int, int]:
    """The definition in the module's docstring, in Python's integers."""
    words = [slow_mix((int.from_bytes(np.float64(value).tobytes(), "little") + (gene + 1) * GOLDEN) & MASK)
             for gene, value in cell.items()]
    more = [slow_mix((word + GOLDEN) & MASK) for word in words]
    return tuple(slow_mix((sum(part) + len(cell) * GOLDEN) & MASK) for part in (words, more))  # type: ignore[return-value]


VALUES = st.floats(0, 2.0**100, width=32, exclude_min=True)
CELLS = st.lists(st.dictionaries(st.integers(0, 65535), VALUES, max_size=12), min_size=1, max_size=6)


@settings(deadline=None)
@given(CELLS)
def test_it_is_the_hash_that_is_documented(cells: list[dict[int, float]]) -> None:
    first, second = content_hashes(batch_of(cells))
    assert [(int(a), int(b)) for a, b in zip(first, second, strict=True)] == [slow_hash(cell) for cell in cells]


@pytest.mark.parametrize("kind", [np.uint16, np.uint32, np.float32])
def test_the_type_of_the_values_does_not_matter(kind: type[np.generic]) -> None:
    cells = [{3: 1.0, 7: 65535.0}, {60000: 12.0}]
    assert hashes(cells, kind).tolist() == hashes(cells, np.float32).tolist()


def hashes(cells: list[dict[int, float]], kind: type[np.generic] = np.float32) -> NDArray[np.uint64]:
    return np.stack(content_hashes(batch_of(cells, kind)))


def test_old_corpora_keep_their_hashes() -> None:
    """Numbers that are stored in corpora must never change."""
    first, second = content_hashes(batch_of([{}, {5: 1.0}, {5: 1.0, 9: 2.5}]))
    assert [f"{value:016x}" for value in first] == ["0000000000000000", "1f0d5574241b087f", "9d0292a6f93bd126"]
    assert [f"{value:016x}" for value in second] == ["0000000000000000", "386171fadf9bb05f", "f9664968d6389b48"]


def test_cells_that_differ_in_one_gene_or_one_value_have_other_hashes() -> None:
    draw = np.random.default_rng(0)
    cell = {int(gene): float(value) for gene, value in zip(draw.choice(60000, 300, replace=False),
                                                            draw.integers(1, 9, 300), strict=True)}
    others = [cell | {gene: value + 1} for gene, value in cell.items()]
    others += [{(key if key != gene else 60001): value for key, value in cell.items()} for gene in cell]
    others += [{key: value for key, value in cell.items() if key != gene} for gene in cell]
    genes = list(cell)
    swapped = [cell | {a: cell[b], b: cell[a]} for a, b in pairwise(genes) if cell[a] != cell[b]]
    found = hashes([cell, *others, *swapped])
    assert len({int(value) for value in found[0]}) == len({int(value) for value in found[1]}) == found.shape[1]


def test_a_deep_check_finds_metadata_with_the_hash_of_another_cell(tmp_path: Path) -> None:
    manifest = write_corpus(tmp_path, {"train": [random_cells([5, 9, 2, 7])]})
    path = tmp_path / manifest.splits["train"].shards[0].obs.file
    table = pq.read_table(path)
    dataset = TokenDataset.open(tmp_path)
    right = content_hashes(dataset.fetch(np.arange(table.num_rows)))[0]
    for hashes, good in ((right, True), (right[::-1], False)):
        pq.write_table(table.append_column("content_hash", pa.array(hashes)), path)
        if good:
            verify_cells(dataset.files, dataset.entry, dataset.manifest.vocab.tokens)
        else:
            with pytest.raises(DataError, match="the metadata are of other cells"):
                verify_cells(dataset.files, dataset.entry, dataset.manifest.vocab.tokens)
