import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.genes import UNMAPPED, map_source, match_genes
from data_pipeline.sources import open_source
from scgpt.errors import SourceError
from scgpt.vocab import GeneVocab
from tests.data_pipeline.atlases import BLOOD, CHR21, GENES, PANCREAS, VOCAB, random_counts, write_h5ad


def token_of(name: str, vocab: GeneVocab = VOCAB) -> str | None:
    token = int(match_genes([name], vocab).tokens[0])
    return None if token == UNMAPPED else vocab.lookup_token(token)


@pytest.mark.parametrize(("name", "token"), [
    ("CD3D", "CD3D"),                                # itself
    ("ENSG00000167286", "CD3D"), ("ENSG00000167286.12", "CD3D"), ("ENSG00000182378.15_PAR_Y", "PLCXD1"),
    ("HLA-B_ENSG00000234745", "HLA-B"),              # as Seurat joins two columns
    ("SEPT7", "SEPTIN7"),                            # a name that Excel ate, renamed since
    ("ENSG99999999999", None), ("ERCC-00002", None), ("", None), ("<pad>", None), ("cd3d", None)])
def test_names_lead_to_their_token(name: str, token: str | None) -> None:
    assert token_of(name) == token


def test_a_current_symbol_finds_the_older_one_of_the_vocabulary() -> None:
    old = GeneVocab(["SEPT7", "CD3D"], specials=["<pad>"])
    assert token_of("SEPTIN7", old) == "SEPT7"
    assert token_of("CDC10", old) == "SEPT7"         # by way of the current symbol
    assert token_of("ENSG00000122545", old) == "SEPT7"


def test_a_previous_symbol_of_two_genes_is_never_mapped() -> None:
    from data_pipeline.genes import gene_tables

    ambiguous = [name for name, later in gene_tables().later.items() if len(later) > 1 and name not in VOCAB]
    assert len(ambiguous) > 100
    mapped = match_genes(ambiguous, VOCAB)
    current = [name for name in ambiguous if name in gene_tables().current]
    assert {name for name, token in zip(ambiguous, mapped.tokens, strict=True) if token != UNMAPPED} <= set(current)


def test_a_current_symbol_is_not_taken_for_the_previous_symbol_of_another_gene() -> None:
    from data_pipeline.genes import gene_tables

    tables = gene_tables()
    shared = sorted(name for name, later in tables.later.items() if name in tables.current and len(later) == 1
                    and name not in tables.previous)
    assert shared
    for name in shared[:50]:
        assert token_of(name, GeneVocab([next(iter(tables.later[name]))])) is None


def test_the_map_counts_what_it_did() -> None:
    found = match_genes(["CD3D", "ENSG00000167286", "SEPT7", "nonsense", "MT-CO1", "ENSG00000198804"], VOCAB)
    assert (found.n_mapped, found.n_merged, found.renamed, found.unmapped) == (5, 2, 1, ("nonsense",))
    assert found.mitochondrial.tolist() == [False, False, False, False, True, True]
    assert found.overlap == pytest.approx(5 / 6)


@pytest.mark.parametrize(("path", "column", "style", "least"), [
    (PANCREAS, "index", "symbol", 0.96), (BLOOD, "index", "symbol", 0.98), (CHR21, "feature_name", "symbol", 0.9)])
def test_real_atlases_find_their_column(path: Path, column: str, style: str, least: float) -> None:
    with open_source(path) as source:
        found = map_source(source, VOCAB)
    assert (found.column, found.style) == (column, style)
    assert found.overlap >= least


def test_real_ensembl_ids_and_symbols_of_one_atlas_agree() -> None:
    with open_source(CHR21) as source:
        by_id, by_symbol = (map_source(source, VOCAB, gene_column=column) for column in ("index", "feature_name"))
    assert by_id.style == "ensembl"
    both = (by_id.tokens != UNMAPPED) & (by_symbol.tokens != UNMAPPED)
    assert both.sum() > 250
    assert (by_id.tokens[both] == by_symbol.tokens[both]).mean() > 0.99


def refusal(tmp_path: Path, genes: list[str], **options: object) -> str:
    path = write_h5ad(tmp_path / "atlas.h5ad", random_counts(0, 5, len(genes)), genes,
                      var=options.pop("var", None))  # type: ignore[arg-type]
    with open_source(path) as source, pytest.raises(SourceError) as caught:
        map_source(source, VOCAB, min_gene_overlap=0.3, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_mouse_symbols_are_recognised(tmp_path: Path) -> None:
    told = refusal(tmp_path, ["Lypla1", "Tcea1", "Atp6v1h", "Rgs20", "Rb1cc1"])
    assert "these are mouse genes" in told
    assert "vocab: gencode-mouse, or vocab: PATH" in told


def test_mouse_ids_and_other_species_are_recognised(tmp_path: Path) -> None:
    assert "these are mouse genes" in refusal(tmp_path, [f"ENSMUSG{i:011d}" for i in range(9)])
    (tmp_path / "atlas.h5ad").unlink()
    assert "species DAR" in refusal(tmp_path, [f"ENSDARG{i:011d}" for i in range(9)])


def test_the_wrong_column_is_told_with_the_right_one(tmp_path: Path) -> None:
    text = refusal(tmp_path, [f"gene{i}" for i in range(20)], var={"symbol": GENES[100:120]}, gene_column="index")
    assert "set gene_column: symbol, where 100.0% are" in text


def test_numbers_and_nonsense_are_told(tmp_path: Path) -> None:
    assert "the names are numbers" in refusal(tmp_path, [str(i) for i in range(9)])
    (tmp_path / "atlas.h5ad").unlink()
    assert "fewer than the 30%" in refusal(tmp_path, [f"probe{i}" for i in range(9)])


def test_a_name_without_end_is_not_told_whole(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, ["x" * 100_000, "y"])) < 600


def test_a_gene_column_that_is_not_there_is_refused() -> None:
    with open_source(CHR21) as source, pytest.raises(Exception, match="no gene column 'symbol'.*feature_name"):
        map_source(source, VOCAB, gene_column="symbol")


def test_tokens_are_those_of_the_vocabulary_whatever_its_order() -> None:
    names = GENES[1000:1100]
    backwards = GeneVocab.from_dict({gene: index for index, gene in enumerate(GENES[::-1])})
    found = match_genes(names, backwards)
    assert np.array_equal(found.tokens, backwards(names))


@pytest.mark.skipif("SCGPT_SHARED" not in os.environ, reason="SCGPT_SHARED names no folder with the shared data")
@pytest.mark.parametrize(("file", "direct", "renamed"), [
    ("10x-pbmc3k_human_blood", 12_300, 744), ("baron2016-h1_human_pancreas", 18_621, 838),
    ("kang2018-pbmc_human_blood", 8_355, 502), ("copykat_human_breast-tumor", 29_867, 922)])
def test_overlaps_of_published_studies(file: str, direct: int, renamed: int) -> None:
    with open_source(Path(os.environ["SCGPT_SHARED"]) / "data" / f"{file}.h5ad") as source:
        found = map_source(source, VOCAB)
    assert found.n_mapped - found.renamed == direct
    assert renamed <= found.renamed <= 1.1 * renamed   # more where an old name leads to another old name


def test_the_names_of_probes_lead_to_their_gene() -> None:
    names = ["ENSG00000167286|CD3D|8eab823", "ENSG00000153563|CD8A|1c2e", "TSPAN6|8eab823"]
    found = match_genes(names, GeneVocab.named("scgpt-human"))
    assert found.tokens.tolist()[:2] == [VOCAB["CD3D"], VOCAB["CD8A"]]
    assert found.unmapped == ("TSPAN6|8eab823",)
