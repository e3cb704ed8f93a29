"""CorpusConfig: which atlases become a corpus, which of their cells and genes, in which splits and shards."""
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, field_validator, model_validator

from data_pipeline.obs_filter import ObsFilter
from data_pipeline.sources.kinds import KINDS
from data_pipeline.sources.location import Location
from scgpt.config import Bytes, Config, ConfigPath, ConfigPlace, Seed
from scgpt.data.ipc_message import Codec
from scgpt.data.schema import CELL_ID, CONTENT_HASH, SOURCE, SOURCE_ROW
from scgpt.errors import ConfigError
from scgpt.vocab import GeneVocab


def _parses(text: str) -> str:
    try:
        ObsFilter.parse(text)
    except ConfigError as error:
        raise ValueError(f"{error.what}; {error.fix}") from error
    return text


def _known(kind: str) -> str:
    if kind not in ("auto", *KINDS):
        raise ValueError(f"choose auto, {', '.join(KINDS)}")
    return kind


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
FilterText = Annotated[str, AfterValidator(_parses)]   # see obs_filter
KindName = Annotated[str, AfterValidator(_known)]


class SourceConfig(Config):
    """One atlas, or a glob of atlases that share these settings. A bare path stands for `{path: ...}`."""

    path: ConfigPlace                      # a file, a folder or a glob, relative to the configuration file; or a URL
    name: str | None = None                # of the source, part of every cell id; null: the file's stem
    kind: KindName = "auto"                # see sources/kinds.py; auto: by the name, else by what the folder holds
    layer: str = "auto"                    # X, raw or a layer's name; auto: X if it holds counts, else raw if that does
    gene_column: str = "auto"              # index or a column of var; auto: the one with most genes in the vocabulary
    gene_table: Literal["scgpt-human"] | ConfigPlace | None = None   # of kind lists: what its gene ids stand for
    columns: Mapping[str, str] = {}        # name in the corpus -> name in this source's obs
    filter: FilterText | None = None       # an expression over obs columns that a cell must satisfy

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value


class GenesConfig(Config):
    """How a source's columns become tokens."""

    min_gene_overlap: Fraction = 0.3       # share of a source's genes with a token; it is refused below
    duplicates: Literal["sum"] = "sum"     # what happens to two columns of one token


class CellsConfig(Config):
    """Which cells are kept; a cell that fails several limits counts under the first, in this order."""

    filter: FilterText | None = None       # an expression over obs columns, for every source
    min_genes: NonNegativeInt = 50         # expressed genes of the vocabulary
    max_genes: NonNegativeInt | None = None   # null: no limit, here and below
    min_counts: float | None = None        # sum over the genes of the vocabulary
    max_counts: PositiveFloat | None = None
    max_value: PositiveFloat | None = None  # largest value of one gene of the vocabulary
    max_mito_fraction: Fraction | None = None   # mitochondrial share of all counts of the cell
    remove_duplicates: bool = False        # of cells with equal genes and values, over all sources, the first stays
    duplicate_min_genes: NonNegativeInt = 20   # a cell of fewer genes is no duplicate: it may equal another by chance
    expression_kind: Literal["counts", "expected_counts", "normalized", "log1p"] = "counts"   # counts must be integers

    @model_validator(mode="after")
    def _some_cell_can_pass(self) -> "CellsConfig":
        for least, most, what in ((self.min_genes, self.max_genes, "genes"),
                                  (self.min_counts, self.max_counts, "counts")):
            if least is not None and most is not None and least > most:
                raise ValueError(f"min_{what} is {least:g}, above max_{what}, {most:g}: no cell has both")
        return self


class SplitsConfig(Config):
    """Which cells are held out: drawn by hash, so that adding a source moves no cell."""

    valid: Fraction = 0.03                 # share of cells (or donors, or datasets) in the split `valid`
    by: Literal["cell", "donor", "dataset"] = "cell"   # what stays together; a cell without it goes by its source
    seed: Seed = 0


class ShardsConfig(Config):
    """The files of the corpus."""

    form: Literal["arrow", "zarr"] = "arrow"   # arrow: mapped, for training; zarr: for windows of cells, object stores
    max_bytes: Annotated[Bytes, Field(ge=1 << 12)] = 512 << 20   # bytes of a token file, at most; before compression
    compression: Literal["none", "zstd", "lz4"] = "none"   # for cold storage: such a corpus is not mapped but decoded
    shuffle: bool = True                   # a seeded permutation of all cells; false: the order of the sources

    @property
    def codec(self) -> Codec | None:
        """The compression, None for none."""
        return None if self.compression == "none" else self.compression


class CorpusConfig(Config):
    """A corpus: sources, metadata columns, genes, cells, splits, shards."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)]
    vocab: Literal["scgpt-human", "gencode-mouse"] | ConfigPath = "scgpt-human"   # a name, or the path of a vocab.json
    columns: tuple[str, ...] = ("dataset", "donor", "tissue", "cell_type", "assay")   # metadata kept where there is any
    genes: GenesConfig = GenesConfig()
    cells: CellsConfig = CellsConfig()
    splits: SplitsConfig = SplitsConfig()
    shards: ShardsConfig = ShardsConfig()
    on_error: Literal["fail", "skip"] = "fail"   # a source that cannot be read ends the build; or is left out, whole
    seed: Seed = 0               # of the shuffle
    # Who does the work: threads of this process, or Ray, on this machine or a cluster; auto: Ray where its start pays.
    workers: Literal["auto", "threads", "ray"] = "auto"

    @field_validator("columns")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        reserved = {CELL_ID, SOURCE, SOURCE_ROW, CONTENT_HASH}
        wrong = sorted(reserved & set(value)) or sorted({name for name in value if value.count(name) > 1})
        if wrong:
            raise ValueError(f"'{wrong[0]}' is kept already, or named twice")
        return value

    def load_vocab(self) -> GeneVocab:
        """The vocabulary that genes are mapped to; ConfigError or DataError when it cannot be read."""
        return GeneVocab.named(str(self.vocab))

    def portable(self) -> Mapping[str, Any]:
        """What the plan hash and manifest hold: plain values, no folder among them, nor who does the work."""
        values = self.model_dump(mode="json", exclude={"workers"})
        for source, config in zip(values["sources"], self.sources, strict=True):
            source["path"] = Location.of(config.path).name
            source["gene_table"] = None if config.gene_table is None else Location.of(config.gene_table).name
        values["vocab"] = str(self.vocab).rpartition("/")[2]
        return values
