"""A source's genes -> token ids: symbols, Ensembl ids with or without a version, previous and later symbols.

In this order: the name itself in the vocabulary; an Ensembl id through its GENCODE v48 symbol (vM37 for mouse ids and a
mouse vocabulary); the current symbol of a name that HGNC lists as previous; a previous symbol of the name, where the
vocabulary is older than the data. A name that leads to two genes is never mapped. Columns that meet in one token are
summed when cells are tokenised.
"""
import csv
import gzip
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files as package_files
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from data_pipeline.sources.base import AUTO, INDEX, Source
from scgpt.counted import counted
from scgpt.errors import SourceError
from scgpt.vocab import GENCODE_MOUSE, PUBLISHED, SPECIAL_TOKENS, GeneVocab

UNMAPPED = -1
SYMBOL, ENSEMBL = "symbol", "ensembl"
# an id alone, with a version, of the Y copy of a pseudoautosomal gene; behind a symbol, as Seurat joins them; before a
# symbol and the name of a probe, as 10x joins them
ENSEMBL_ID = re.compile(r"(?:(?P<symbol>[^|]+)[_|])?(?P<id>ENS(?P<species>[A-Z]{0,6})G\d{11})(?:\.\d+)?(?:_PAR_Y)?"
                        r"(?:\|.*)?")
_MITOCHONDRIAL = "MT-"
_SHOWN = 60           # letters of a name in a message
_MOUSE_SHARE = 0.05   # of the tokens of a vocabulary that may be asked for mouse genes
HUMAN, MOUSE = "human", "mouse"


@dataclass(frozen=True, slots=True)
class GeneMap:
    """Where each column of a source goes."""

    tokens: NDArray[np.int32]          # (n_genes,)  token id, or UNMAPPED
    mitochondrial: NDArray[np.bool_]   # (n_genes,)  gene of the mitochondrial genome, mapped or not
    n_tokens: int                      # size of the vocabulary
    style: str                         # SYMBOL or ENSEMBL: what most of the names are
    column: str                        # where the names were found: INDEX or a column of var
    renamed: int                       # mapped columns whose name is a previous or later symbol of their token
    unmapped: tuple[str, ...]          # names without a token, sorted

    @property
    def n_mapped(self) -> int:
        """Columns with a token."""
        return int((self.tokens != UNMAPPED).sum())

    @property
    def n_merged(self) -> int:
        """Columns that share the token of an earlier column: their values are summed."""
        mapped = self.tokens[self.tokens != UNMAPPED]
        return len(mapped) - len(np.unique(mapped))

    @property
    def overlap(self) -> float:
        """Share of the columns that have a token."""
        return self.n_mapped / max(len(self.tokens), 1)


class GeneTables:
    """GENCODE and HGNC as dictionaries."""

    def __init__(self) -> None:
        self.symbol_of = {row[0]: row[1] for row in _rows("gencode_v48_human.csv.gz")}
        self.current = frozenset(self.symbol_of.values())
        self.later: dict[str, set[str]] = {}      # previous symbol -> current symbols
        self.previous: dict[str, set[str]] = {}   # current symbol -> previous symbols
        by_id: dict[str, set[str]] = {}
        for symbol, previous, _, ids, *_ in islice(_rows("hgnc_previous_symbols.csv.gz"), 1, None):
            self.later.setdefault(previous, set()).add(symbol)
            self.previous.setdefault(symbol, set()).add(previous)
            for ensembl_id in filter(None, ids.split(";")):
                by_id.setdefault(ensembl_id, set()).add(symbol)
        self.current |= self.previous.keys()
        # an id that GENCODE v48 has retired, but that HGNC still gives to one gene
        self.symbol_of |= {key: next(iter(symbols)) for key, symbols in by_id.items()
                           if len(symbols) == 1 and key not in self.symbol_of}

    @cached_property
    def mouse(self) -> dict[str, str]:
        """GENCODE's mouse genes that have a symbol: Ensembl id -> symbol."""
        return {row[0]: row[1] for row in _rows("gencode_vM37_mouse.csv.gz") if row[1] != row[0]}

    @cached_property
    def mouse_symbols(self) -> frozenset[str]:
        """Symbols of mouse genes."""
        return frozenset(self.mouse.values())

    @cached_property
    def mouse_only(self) -> frozenset[str]:
        """Symbols of mouse genes that no human gene bears."""
        return self.mouse_symbols - self.current

    def symbols_for(self, known: Mapping[str, int]) -> dict[str, str]:
        """Ensembl id -> symbol; mouse ids only where the vocabulary holds mouse genes: some symbols are human too."""
        is_mouse = len(known.keys() & self.mouse_only) >= _MOUSE_SHARE * len(known)
        return self.symbol_of | self.mouse if is_mouse else self.symbol_of


def match_genes(names: Sequence[str], vocab: GeneVocab, *, column: str = INDEX) -> GeneMap:
    """Map gene names to the tokens of `vocab`; O(names), no draw, no order: equal names give equal maps."""
    tables = gene_tables()
    known = {token: index for token, index in vocab.get_stoi().items() if token not in SPECIAL_TOKENS}
    symbol_of = tables.symbols_for(known) if any("ENSMUSG" in name for name in names) else tables.symbol_of
    tokens = np.full(len(names), UNMAPPED, np.int32)
    mitochondrial = np.zeros(len(names), bool)
    renamed = n_ensembl = 0
    for place, name in enumerate(names):
        symbol, is_ensembl = _symbol(name, known, symbol_of)
        n_ensembl += is_ensembl
        mitochondrial[place] = symbol.upper().startswith(_MITOCHONDRIAL)
        token = known.get(symbol)
        if token is None and (other := _other_name(symbol, known, tables)) is not None:
            token = known[other]
            renamed += 1
        if token is not None:
            tokens[place] = token
    unmapped = sorted({name for name, token in zip(names, tokens, strict=True) if token == UNMAPPED})
    return GeneMap(tokens, mitochondrial, len(vocab), ENSEMBL if 2 * n_ensembl > len(names) else SYMBOL, column,
                   renamed, tuple(unmapped))


def map_source(source: Source, vocab: GeneVocab, *, gene_column: str = AUTO, min_gene_overlap: float = 0.0) -> GeneMap:
    """Find the names of a source's genes and map them.

    Args:
        source: an open source.
        vocab: its tokens are the targets.
        gene_column: INDEX or a column of var; AUTO: the one of them with the most genes in the vocabulary.
        min_gene_overlap: share of the genes that must have a token.

    Raises SourceError below `min_gene_overlap`, with what the names look like.
    """
    columns = source.gene_columns() if gene_column == AUTO else [gene_column]
    maps = [match_genes(source.gene_names(column), vocab, column=column) for column in columns]
    best = max(maps, key=lambda found: found.n_mapped)   # the first among equals
    if best.overlap < min_gene_overlap or not best.n_mapped:
        raise _refusal(source, vocab, best, gene_column, min_gene_overlap)
    return best


def _symbol(name: str, known: Mapping[str, int], symbol_of: Mapping[str, str]) -> tuple[str, bool]:
    """What a name says the gene is called, and whether it said so by an Ensembl id."""
    match = ENSEMBL_ID.fullmatch(name)
    if match is None:
        return name, False
    if name in known:
        return name, True
    if match["id"] in known:   # a vocabulary of Ensembl ids
        return match["id"], True
    return symbol_of.get(match["id"], match["symbol"] or match["id"]), True


def _other_name(symbol: str, known: dict[str, int], tables: GeneTables) -> str | None:
    """The one token that is a later or an earlier symbol of the same gene; None where there is none, or a choice.

    A current symbol is never read as a previous symbol of another gene, nor may the token be the current symbol of one.
    """
    if symbol in tables.current:
        current = symbol
    else:
        later = tables.later.get(symbol, set())
        if len(later) != 1:
            return None
        current = next(iter(later))
        if current in known:
            return current
    earlier = [name for name in tables.previous.get(current, ())
               if name in known and len(tables.later[name]) == 1 and name not in tables.current]
    return earlier[0] if len(earlier) == 1 else None


def _refusal(source: Source, vocab: GeneVocab, best: GeneMap, gene_column: str, least: float) -> SourceError:
    names = source.gene_names(best.column)
    found = f"{best.n_mapped} of {counted(len(names), 'gene')} ({best.overlap:.1%}) are in the vocabulary"
    where = f"{source.path}, gene names from '{best.column}'"
    example = f"such as {names[0][:_SHOWN]}" if names else "no genes"
    columns = source.gene_columns() if gene_column == AUTO else [best.column]
    species = next(filter(None, (species_of(source.gene_names(column)) for column in columns)), None)
    expected = species_of([*vocab])
    if species is not None and expected is not None and species != expected:
        shipped = {HUMAN: f"vocab: {PUBLISHED}, or ", MOUSE: f"vocab: {GENCODE_MOUSE}, or "}.get(species, "")
        return SourceError(f"{found}: these are {species} genes, {example}", where=where,
                           fix=f"take a {expected} atlas, or give a {species} vocabulary ({shipped}vocab: PATH, made "
                               "by scgpt vocab build)")
    if gene_column != AUTO:
        others = [match_genes(source.gene_names(column), vocab, column=column) for column in source.gene_columns()]
        better = max(others, key=lambda other: other.n_mapped)
        if better.overlap >= max(least, 2 * best.overlap) and better.n_mapped:
            return SourceError(f"{found}, {example}", where=where,
                               fix=f"set gene_column: {better.column}, where {better.overlap:.1%} are")
    if names and sum(name.isdigit() for name in names) > len(names) // 2:
        return SourceError(f"{found}: the names are numbers, {example}", where=where,
                           fix="write the gene symbols or Ensembl ids into var_names")
    return SourceError(f"{found}, fewer than the {least:.0%} asked for, {example}", where=where,
                       fix="name the column of var that holds symbols or Ensembl ids (gene_column), give another "
                           "vocabulary, or lower genes.min_gene_overlap")


def species_of(names: Sequence[str]) -> str | None:
    """HUMAN, MOUSE, or another by its Ensembl letters, when most names are of that species; else None."""
    letters = [match["species"] for match in map(ENSEMBL_ID.fullmatch, names) if match]
    if 2 * len(letters) > len(names):
        most = max(set(letters), key=lambda species: (letters.count(species), species))
        if 2 * letters.count(most) > len(letters):
            return {"": HUMAN, "MUS": MOUSE}.get(most, f"non-human (Ensembl species {most})")
    tables = gene_tables()
    for species, symbols in ((HUMAN, tables.current), (MOUSE, tables.mouse_only)):
        if 2 * sum(name in symbols for name in names) > len(names):
            return species
    return None


@cache
def gene_tables() -> GeneTables:
    """What GENCODE and HGNC know; read once a process."""
    return GeneTables()


def _rows(table: str) -> Iterator[list[str]]:
    """Row by row: 80,000 lists at once would have the garbage collector look through them all, again and again."""
    content = gzip.decompress((package_files("scgpt.tables") / table).read_bytes()).decode()
    return csv.reader(content.splitlines())
