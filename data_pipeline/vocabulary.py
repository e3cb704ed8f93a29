"""A vocabulary from atlases: every gene that they name, under one symbol each, in scGPT's format.

Sorted by name, special tokens last, as the published vocabulary is: the same atlases give the same bytes, in any order.
A gene that atlases name in several ways (an Ensembl id, a previous symbol) becomes one token where the tables know it.
"""
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.config import CorpusConfig, SourceConfig
from data_pipeline.genes import ENSEMBL_ID, HUMAN, MOUSE, gene_tables, species_of
from data_pipeline.plan import expand
from data_pipeline.sources import Source, open_source
from data_pipeline.sources.base import AUTO
from data_pipeline.sources.hdf5_structure import check_structure
from data_pipeline.sources.location import Location
from scgpt.config import load_config, validate
from scgpt.counted import counted
from scgpt.errors import ConfigError, SourceError
from scgpt.vocab import SPECIAL_TOKENS, GeneVocab

OTHER = "other"                       # a species without tables: names are taken as they are
SPECIES = (AUTO, HUMAN, MOUSE, OTHER)


@dataclass(frozen=True, slots=True)
class SourceGenes:
    """What one atlas calls its genes."""

    name: str
    column: str                # where the names were found
    n_names: int
    tokens: frozenset[str]     # what they become
    n_renamed: int             # of the names: Ensembl ids and previous symbols that became a symbol


@dataclass(frozen=True, slots=True)
class BuiltVocab:
    """A vocabulary and where it comes from."""

    vocab: GeneVocab
    species: str
    sources: tuple[SourceGenes, ...]
    n_rare: int                # genes left out, in fewer sources than asked for


def sources_of(words: Sequence[str], *, gene_column: str = AUTO) -> list[SourceConfig]:
    """What a command line names: atlases, globs, and the YAML files of corpora, which say of their sources all.

    Args:
        words: paths, URLs, globs; *.yaml and *.yml are corpus configurations.
        gene_column: of the sources that are named themselves.
    """
    found: list[SourceConfig] = []
    for word in words:
        if word.endswith((".yaml", ".yml")):
            found.extend(load_config(CorpusConfig, word, kind="corpus").sources)
        else:
            found.append(validate(SourceConfig, {"path": word, "gene_column": gene_column}))
    return found


def build_vocab(sources: Sequence[SourceConfig], *, species: str = AUTO, min_sources: int = 1) -> BuiltVocab:
    """Collect the genes of atlases; reads headers, and the first rows where a matrix must be chosen.

    Args:
        sources: what `CorpusConfig.sources` holds: `gene_column` says where names are; AUTO: where most are known.
        species: one of SPECIES; AUTO: that of most names of the sources, OTHER where they do not say.
        min_sources: a gene must be named by so many of them.

    Raises ConfigError for sources of two species, and when no gene is left; SourceError for one that cannot be read.
    """
    species = _common_species(sources) if species == AUTO else species
    found = []
    for location, config in expand(sources):
        with _open(location, config) as source:
            found.append(_genes_of(source, config.gene_column, species))
    times = Counter(token for genes in found for token in genes.tokens)
    kept = sorted(token for token, count in times.items() if count >= min_sources)
    if not kept:
        raise ConfigError(f"no gene is named by {min_sources} of the {counted(len(found), 'source')}",
                          where="--min-sources", fix="lower it, or give more atlases")
    vocab = GeneVocab(kept, SPECIAL_TOKENS, special_first=False, default_token=None)
    return BuiltVocab(vocab, species, tuple(found), len(times) - len(kept))


def publish_vocab(vocab: GeneVocab, out: Path) -> None:
    """Write `vocab.json`; ConfigError where another vocabulary lies, on which a corpus or a model may rest."""
    if out.exists() and out.read_bytes() != vocab.to_bytes():
        raise ConfigError("there is another vocabulary, which corpora and models may rest on", where=str(out),
                          fix="give another --out, or move that file away")
    vocab.save_json(out)


def _open(location: Location, config: SourceConfig) -> Source:
    check_structure(location)
    return open_source(location, name=config.name, kind=config.kind, layer=config.layer, gene_table=config.gene_table)


def _common_species(sources: Sequence[SourceConfig]) -> str:
    """What most names of all sources are; ConfigError when two sources differ."""
    seen: dict[str, str] = {}
    for location, config in expand(sources):
        with _open(location, config) as source:
            columns = source.gene_columns() if config.gene_column == AUTO else [config.gene_column]
            told = next(filter(None, (species_of(source.gene_names(column)) for column in columns)), None)
        if told is not None:
            seen.setdefault(told, str(location))
    if len(seen) > 1:
        raise ConfigError(f"the sources are of several species: {', '.join(seen)}", where=", ".join(seen.values()),
                          fix="build one vocabulary a species, or take all names as they are: --species other")
    species = next(iter(seen), OTHER)
    return species if species in SPECIES else OTHER


def _genes_of(source: Source, gene_column: str, species: str) -> SourceGenes:
    columns = source.gene_columns() if gene_column == AUTO else [gene_column]
    names = {column: source.gene_names(column) for column in columns}
    best = max(columns, key=lambda column: sum(_is_known(name, species) for name in set(names[column])))
    tokens = {name: token_of(name, species) for name in names[best]}
    genes = frozenset(token for token in tokens.values() if token)
    if not genes:
        raise SourceError(f"the column '{best}' of var holds no gene names", where=str(source.path),
                          fix="name the column that does: --gene-column")
    renamed = sum(token not in (name, "") for name, token in tokens.items())
    return SourceGenes(source.name, best, len(names[best]), genes, renamed)


def _is_known(name: str, species: str) -> bool:
    """Whether the tables of the species lead somewhere from this name."""
    if species == OTHER:
        return False
    symbols = gene_tables().current if species == HUMAN else gene_tables().mouse_symbols
    return token_of(name, species) in symbols


def token_of(name: str, species: str) -> str:
    """The one name of a gene: its symbol where the tables know it, else the name; empty for what is no gene."""
    if not name or (name.startswith("<") and name.endswith(">")):
        return ""
    tables, match = gene_tables(), ENSEMBL_ID.fullmatch(name)
    if match is not None:   # what stands before an unknown id may be a genome, or a mark: the id is sure
        symbol_of = tables.symbol_of if species == HUMAN else tables.mouse if species == MOUSE else {}
        return symbol_of.get(match["id"], match["id"])
    later = tables.later.get(name, ()) if species == HUMAN and name not in tables.current else ()
    return next(iter(later)) if len(later) == 1 else name
