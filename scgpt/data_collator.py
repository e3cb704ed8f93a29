"""Upstream's `DataCollator`: a list of cells as tensors -> one padded batch, masked or split, for stock training loops.

Draws come from torch's global generator, as upstream's. Unlike upstream it leaves the examples it is given unchanged,
and bins into `n_bins`. Our own training packs instead: `scgpt.collate`.
"""
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from scgpt.preprocess import binning

if TYPE_CHECKING:
    from torch import Tensor

DATA_STYLES = ("pcpt", "gen", "both")


class _Cell(NamedTuple):
    genes: "Tensor"        # (genes,) int64
    expressions: "Tensor"  # (genes,) float


@dataclass
class DataCollator:
    """Collate examples {"genes": (n,) int64, "expressions": (n,) float} into padded tensors.

    Styles: "pcpt" gives `gene`, `expr` (the target) and `masked_expr`; "gen", and "both" without `do_mlm`, give
    `pcpt_gene` and `pcpt_expr`; "both" splits each cell at random into `pcpt_gene`, `pcpt_expr` and `gen_gene`,
    `gen_expr_target`, and adds `pcpt_key_padding_mask` and `gen_key_padding_mask` (True = padding).
    """

    do_padding: bool = True            # False: pad_token_id may be missing; then cells must come out equally long
    pad_token_id: int | None = None    # gene id at padding
    pad_value: int = 0                 # expression at padding
    do_mlm: bool = True                # mask ("pcpt") or split ("both")
    do_binning: bool = True            # bin the expressions of each whole cell first
    mlm_probability: float | Sequence[float] = 0.15  # share masked or generated; a list: drawn once a batch
    mask_value: int = -1               # expression where masked
    max_length: int | None = None      # tokens of a row at most
    sampling: bool = True              # a longer cell is sampled; False: cut
    keep_first_n_tokens: int = 1       # never binned, sampled away, masked or generated (`<cls>`)
    reserve_keys: list[str] = field(default_factory=list, kw_only=True)  # other keys, stacked into the batch
    data_style: str = field(default="pcpt", kw_only=True)
    n_bins: int = field(default=51, kw_only=True)

    def __post_init__(self) -> None:
        if self.do_padding and (self.pad_token_id is None or self.max_length is None):
            raise ValueError("padding needs pad_token_id and max_length")
        if self.max_length is not None and not 0 <= self.keep_first_n_tokens <= self.max_length:
            raise ValueError(f"keep_first_n_tokens must be between 0 and max_length ({self.max_length}), "
                             f"not {self.keep_first_n_tokens}")
        if self.do_mlm and not all(0 < p < 1 for p in self._probabilities()):
            raise ValueError(f"mlm_probability must lie between 0 and 1, not {self.mlm_probability}")
        if self.data_style not in DATA_STYLES:
            raise ValueError(f"data_style must be one of {', '.join(DATA_STYLES)}, not '{self.data_style}'")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, "Tensor"]:
        """One batch; see the class. The batch is as long as its longest cell, but at most `max_length`."""
        import torch

        cells = [self._binned(_Cell(example["genes"], example["expressions"])) for example in examples]
        longest = max((len(cell.genes) for cell in cells), default=0)
        length = longest if self.max_length is None else min(longest, self.max_length)
        if self.data_style == "both" and self.do_mlm:
            batch = self._split_batch(cells, length)
        else:
            genes, expressions, _ = self._stack(cells, length, self.keep_first_n_tokens)
            if self.data_style == "pcpt":
                masked = self._mask(expressions) if self.do_mlm else expressions
                batch = {"gene": genes, "expr": expressions, "masked_expr": masked}
            else:
                batch = {"pcpt_gene": genes, "pcpt_expr": expressions}
        for key in self.reserve_keys:
            batch[key] = torch.stack([torch.as_tensor(example[key]) for example in examples])
        return batch

    def _probabilities(self) -> Sequence[float]:
        return self.mlm_probability if isinstance(self.mlm_probability, Sequence) else (self.mlm_probability,)

    def _draw_probability(self) -> float:
        import torch

        choices = self._probabilities()
        return choices[int(torch.randint(len(choices), ()))] if len(choices) > 1 else choices[0]

    def _binned(self, cell: _Cell) -> _Cell:
        if not self.do_binning:
            return cell
        import torch

        keep = self.keep_first_n_tokens
        kept, rest = cell.expressions[:keep], cell.expressions[keep:]
        bins = torch.as_tensor(binning(rest, self.n_bins)).to(rest.device, rest.dtype)
        return _Cell(cell.genes, torch.cat([kept, bins]))

    def _stack(self, cells: Sequence[_Cell], length: int, keep: int) -> tuple["Tensor", "Tensor", "Tensor"]:
        """Genes, expressions and padding mask, (cells, length) each."""
        import torch

        rows = [self._shortened(cell, length, keep) for cell in cells]
        lengths = torch.tensor([len(row.genes) for row in rows])
        if self.pad_token_id is None and len(lengths.unique()) > 1:
            raise ValueError("without pad_token_id the cells must be of one length")
        stacked = [torch.stack([torch.nn.functional.pad(x, (0, length - len(x)), value=value) for x in column])
                   for column, value in zip(zip(*rows, strict=True), (self.pad_token_id, self.pad_value), strict=True)]
        return stacked[0], stacked[1], torch.arange(length) >= lengths.unsqueeze(1)

    def _shortened(self, cell: _Cell, length: int, keep: int) -> _Cell:
        """At most `length` genes, the first `keep` among them: sampled without replacement, or cut."""
        import torch

        n_genes = len(cell.genes)
        if n_genes <= length:
            return cell
        if not self.sampling:
            return _Cell(cell.genes[:length], cell.expressions[:length])
        chosen = torch.cat([torch.arange(keep), torch.randperm(n_genes - keep)[: length - keep] + keep])
        return _Cell(cell.genes[chosen], cell.expressions[chosen])

    def _mask(self, expressions: "Tensor") -> "Tensor":
        """A copy with `mask_value` at positions drawn independently, neither `pad_value` nor among the first.

        As upstream, a token whose expression equals `pad_value` is not masked either.
        """
        import torch

        probability = torch.full(expressions.shape, self._draw_probability())
        probability[expressions == self.pad_value] = 0
        probability[:, : self.keep_first_n_tokens] = 0
        return expressions.masked_fill(torch.bernoulli(probability).bool().to(expressions.device), self.mask_value)

    def _split_batch(self, cells: Sequence[_Cell], length: int) -> dict[str, "Tensor"]:
        """Each cell's genes after the first go to generation with the drawn share, the rest to perception."""
        import torch

        keep, probability = self.keep_first_n_tokens, self._draw_probability()
        gen_length = int((length - keep) * probability)
        perception, generation = [], []
        for cell in cells:
            order = torch.randperm(max(len(cell.genes) - keep, 0)) + keep
            n_generated = int(len(order) * probability)
            seen = torch.cat([torch.arange(min(keep, len(cell.genes))), order[n_generated:]])
            perception.append(_Cell(cell.genes[seen], cell.expressions[seen]))
            generation.append(_Cell(*(x[order[:n_generated]] for x in cell)))
        genes, expressions, is_padding = self._stack(perception, length - gen_length, keep)
        gen_genes, gen_expressions, gen_is_padding = self._stack(generation, gen_length, 0)
        return {"pcpt_gene": genes, "pcpt_expr": expressions, "pcpt_key_padding_mask": is_padding,
                "gen_gene": gen_genes, "gen_expr_target": gen_expressions, "gen_key_padding_mask": gen_is_padding}
