"""A vocabulary of atlases: the same bytes in any order, one token a gene, ready for a corpus of another species."""
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.genes import UNMAPPED, gene_tables, match_genes, species_of
from data_pipeline.plan import make_plan
from data_pipeline.sources import open_source
from data_pipeline.vocabulary import BuiltVocab, build_vocab, publish_vocab, sources_of, token_of
from launch import cli
from scgpt.data import TokenDataset
from scgpt.errors import ConfigError, SourceError
from scgpt.vocab import GENCODE_MOUSE, SPECIAL_TOKENS, GeneVocab
from tests.data_pipeline.atlases import (
    ATLAS,
    BLOOD,
    CHR21,
    PANCREAS,
    ROOT,
    VOCAB,
    build_here,
    config_of,
    random_counts,
    write_h5ad,
)

MOUSE = ROOT / "examples" / "mouse" / "dentate-gyrus.h5ad"


def built(*places: Path | str, gene_column: str = "auto", **options: Any) -> BuiltVocab:
    return build_vocab(sources_of([str(place) for place in places], gene_column=gene_column), **options)


def genes_of(found: BuiltVocab) -> list[str]:
    return found.vocab.get_itos()[:-3]


def atlas(path: Path, genes: list[str], var: dict[str, Any] | None = None) -> Path:
    return write_h5ad(path, random_counts(0, 4, len(genes)), genes, var=var)


def test_genes_are_sorted_and_special_tokens_follow_as_in_the_published_vocabulary() -> None:
    found = built(MOUSE)
    assert found.species == "mouse"
    assert genes_of(found) == sorted(genes_of(found))
    assert found.vocab.get_itos()[-3:] == list(SPECIAL_TOKENS) == VOCAB.get_itos()[-3:]
    with open_source(MOUSE) as source:
        assert set(genes_of(found)) == set(source.gene_names())


def test_the_order_of_the_sources_changes_nothing() -> None:
    assert built(BLOOD, CHR21, PANCREAS).vocab.to_bytes() == built(PANCREAS, CHR21, BLOOD).vocab.to_bytes()
    assert built(f"{ATLAS}/*.h5ad").vocab.to_bytes() == built(PANCREAS, CHR21, BLOOD).vocab.to_bytes()


def test_ids_and_symbols_and_previous_symbols_of_a_gene_are_one_token(tmp_path: Path) -> None:
    first = atlas(tmp_path / "symbols.h5ad", ["CD3D", "SEPT7", "MT-CO1"])
    second = atlas(tmp_path / "ids.h5ad", ["ENSG00000167286.12", "ENSG00000122545", "CD8A_ENSG00000153563"])
    found = built(first, second)
    assert genes_of(found) == ["CD3D", "CD8A", "MT-CO1", "SEPTIN7"]
    assert [source.n_renamed for source in found.sources] == [1, 3]
    for path in (first, second):
        with open_source(path) as source:
            assert match_genes(source.gene_names(), found.vocab).n_mapped == 3


def test_mouse_ids_become_symbols_and_are_read_with_them(tmp_path: Path) -> None:
    ids = ["ENSMUSG00000051951", "ENSMUSG00000024164.5", "ENSMUSG00000102693"]   # Xkr4, C3, 4933401J01Rik
    path = atlas(tmp_path / "ids.h5ad", ids)
    found = built(path)
    assert (found.species, genes_of(found)) == ("mouse", ["4933401J01Rik", "C3", "Xkr4"])
    assert (match_genes(ids, found.vocab).tokens != UNMAPPED).all()
    mouse = GeneVocab.named(GENCODE_MOUSE)
    assert mouse.lookup_tokens(match_genes(ids, mouse).tokens.tolist()) == ["Xkr4", "C3", "4933401J01Rik"]


def test_a_mouse_id_never_leads_to_a_human_gene_of_the_same_symbol() -> None:
    assert match_genes(["ENSMUSG00000024164"], VOCAB).tokens.tolist() == [UNMAPPED]   # C3
    assert match_genes(["ENSG00000125730"], VOCAB).tokens.tolist() == [VOCAB["C3"]]


def test_the_named_mouse_vocabulary_holds_every_symbol_and_fits_sixteen_bits() -> None:
    vocab = GeneVocab.named(GENCODE_MOUSE)
    assert set(vocab) - set(SPECIAL_TOKENS) == gene_tables().mouse_symbols
    assert len(vocab) < 1 << 16
    assert not any(token.startswith("ENSMUSG") for token in vocab)
    assert vocab.sha256 == GeneVocab.named(GENCODE_MOUSE).sha256


HUMAN_NAMES = sorted(gene_tables().current)[::400]
NAMES = st.one_of(
    st.sampled_from(HUMAN_NAMES), st.sampled_from(sorted(gene_tables().later)[::150]),
    st.sampled_from(sorted(gene_tables().symbol_of)[::400]),
    st.builds("{}.{}".format, st.sampled_from(sorted(gene_tables().symbol_of)[::400]), st.integers(1, 30)),
    st.builds("{}_{}".format, st.sampled_from(HUMAN_NAMES), st.sampled_from(sorted(gene_tables().symbol_of)[::400])),
    st.sampled_from(sorted(gene_tables().mouse)[::900]), st.text(st.characters(codec="utf-8", exclude_characters="\0"),
                                                                  min_size=1, max_size=8))


@given(st.lists(NAMES, min_size=1, max_size=40), st.sampled_from(["human", "other"]))
def test_every_gene_that_is_named_has_a_token_in_the_vocabulary_of_it(names: list[str], species: str) -> None:
    genes = [name for name in names if not (name.startswith("<") and name.endswith(">"))]
    tokens = sorted({token_of(name, species) for name in genes})
    found = match_genes(genes, GeneVocab(tokens, SPECIAL_TOKENS, special_first=False))
    assert found.unmapped == ()


def test_rare_genes_are_left_out(tmp_path: Path) -> None:
    paths = [atlas(tmp_path / f"{i}.h5ad", genes) for i, genes in
             enumerate((["CD3D", "CD8A", "A"], ["CD3D", "CD8A"], ["CD3D", "B"]))]
    assert genes_of(built(*paths, min_sources=2)) == ["CD3D", "CD8A"]
    assert built(*paths, min_sources=2).n_rare == 2
    assert genes_of(built(*paths, min_sources=3)) == ["CD3D"]
    with pytest.raises(ConfigError, match="no gene is named by 4 of the 3 sources"):
        built(*paths, min_sources=4)


def test_the_column_with_the_most_known_names_is_taken(tmp_path: Path) -> None:
    path = atlas(tmp_path / "a.h5ad", ["x1", "x2"], var={"note": ["n", "n"], "symbol": ["CD3D", "CD8A"]})
    assert (genes_of(built(path)), built(path).sources[0].column) == (["CD3D", "CD8A"], "symbol")
    assert genes_of(built(path, gene_column="index")) == ["x1", "x2"]


def test_a_species_without_tables_keeps_its_names(tmp_path: Path) -> None:
    path = atlas(tmp_path / "fish.h5ad", ["ENSDARG00000000001", "ENSDARG00000000002.3", "sox2"])
    found = built(path)
    assert (found.species, genes_of(found)) == ("other", ["ENSDARG00000000001", "ENSDARG00000000002", "sox2"])
    build_here(config_of(path, vocab=str(saved(found.vocab, tmp_path)), cells={"min_genes": 0}), tmp_path / "corpus")


def saved(vocab: GeneVocab, folder: Path) -> Path:
    publish_vocab(vocab, folder / "vocab.json")
    return folder / "vocab.json"


@pytest.mark.parametrize(("name", "species", "token"), [
    ("CD3D_ENSG00000167286", "human", "CD3D"), ("GRCh38_ENSG99999999999", "human", "ENSG99999999999"),
    ("DEPRECATED_ENSMUSG99999999999|Itgb2l|2ef1e7b", "mouse", "ENSMUSG99999999999"),
    ("ENSMUSG00000051951|Xkr4|1", "mouse", "Xkr4"), ("sox2_ENSDARG00000000001", "other", "ENSDARG00000000001"),
    ("SEPT7", "human", "SEPTIN7"), ("SEPT7", "other", "SEPT7"), ("<cls>", "human", ""), ("", "other", "")])
def test_a_name_becomes_one_token(name: str, species: str, token: str) -> None:
    assert token_of(name, species) == token


def test_two_species_are_refused_unless_names_are_taken_as_they_are() -> None:
    with pytest.raises(ConfigError, match=r"several species: human, mouse.*--species other"):
        built(PANCREAS, MOUSE)
    assert len(built(PANCREAS, MOUSE, species="other").vocab) > 30_000


def test_names_that_are_no_genes_are_left_out(tmp_path: Path) -> None:
    assert genes_of(built(atlas(tmp_path / "a.h5ad", ["<pad>", "<odd>", "", "CD3D"]))) == ["CD3D"]
    with pytest.raises(SourceError, match="holds no gene names"):
        built(atlas(tmp_path / "b.h5ad", ["<pad>", ""]))


def test_another_vocabulary_is_not_replaced(tmp_path: Path) -> None:
    path = saved(GeneVocab(["A"], SPECIAL_TOKENS), tmp_path)
    content = path.read_bytes()
    publish_vocab(GeneVocab(["A"], SPECIAL_TOKENS), path)
    with pytest.raises(ConfigError, match="another vocabulary"):
        publish_vocab(GeneVocab(["B"], SPECIAL_TOKENS), path)
    assert path.read_bytes() == content


def test_the_sources_of_a_corpus_configuration_are_taken_with_their_settings(tmp_path: Path) -> None:
    atlas(tmp_path / "a.h5ad", ["x1", "x2"], var={"mine": ["CD3D", "CD8A"]})
    (tmp_path / "corpus.yaml").write_text("sources: [{path: a.h5ad, gene_column: mine}]\nvocab: not-yet.json\n")
    found = built(tmp_path / "corpus.yaml")
    assert genes_of(found) == ["CD3D", "CD8A"]


def test_a_mouse_atlas_builds_with_its_own_vocabulary(tmp_path: Path) -> None:
    path = saved(built(MOUSE).vocab, tmp_path)
    manifest = build_here(config_of(MOUSE, vocab=str(path)), tmp_path / "corpus")
    assert manifest.sources[0].genes.overlap == 1.0
    assert sum(split.cells for split in manifest.splits.values()) == 100
    dataset = TokenDataset.open(tmp_path / "corpus")
    with open_source(MOUSE) as source:
        row = dataset.obs(["source_row"]).column(0)[0].as_py()
        counts = source.read_rows(row, row + 1)
        names = np.array(source.gene_names())[counts.indices]
    expected = dict(zip(names.tolist(), counts.data.astype(int).tolist(), strict=True))
    cell = dataset[0]
    assert dict(zip(dataset.vocab.lookup_tokens(cell["genes"].tolist()), cell["expressions"].tolist(),
                    strict=True)) == expected


def test_an_atlas_of_another_species_than_the_vocabulary_is_told_so() -> None:
    with pytest.raises(SourceError, match="these are mouse genes.*take a human atlas, or give a mouse vocabulary"):
        make_plan(config_of(MOUSE))
    with pytest.raises(SourceError, match="these are human genes.*take a mouse atlas, or give a human vocabulary"):
        make_plan(config_of(PANCREAS, vocab=GENCODE_MOUSE))


def test_species_are_told_by_most_names() -> None:
    assert species_of(["CD3D", "INS", "Xkr4"]) == "human"
    assert species_of(["Cd3d", "Ins1", "INS"]) == "mouse"
    assert species_of(["ENSDARG00000000001"] * 3) == "non-human (Ensembl species DAR)"
    assert species_of(["a", "b"]) is None
    assert species_of([]) is None
    assert species_of(VOCAB.get_itos()) == "human"
    assert species_of(GeneVocab.named(GENCODE_MOUSE).get_itos()) == "mouse"


def test_the_command_answers_and_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "vocab.json"
    assert cli.main(["vocab", "build", str(MOUSE), "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["species"], answer["tokens"]) == ("mouse", len(json.loads(out.read_text())))
    assert answer["sha256"] == GeneVocab.from_file(out).sha256
    assert cli.main(["vocab", "build", str(BLOOD), "--out", str(out)]) == 2
    assert "another vocabulary" in capsys.readouterr().err
    assert cli.main(["vocab", "build", str(tmp_path / "no.h5ad"), "--out", str(tmp_path / "x.json")]) == 1
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(SystemExit):
        cli.main(["vocab", "build", str(BLOOD), "--out", str(out), "--min-sources", "0"])
