"""CellEncoder: genes and values of cells -> hidden vectors, through embedding, batch norm and layers.

Three forms of a batch give the same numbers for the same cells: padded rows, packed cells, and perception and
generation parts of either. All that comes after (decoders, losses) is TransformerModel's.
"""
from typing import Any

import torch
from torch import Tensor, nn

from scgpt.model.attention import PaddedLayout
from scgpt.model.batch_norm import BatchNorm1d
from scgpt.model.dsbn import DomainSpecificBatchNorm1d
from scgpt.model.encoders import BatchLabelEncoder, CategoryValueEncoder, ContinuousValueEncoder, GeneEncoder
from scgpt.model.heads import Chosen, Hidden
from scgpt.model.layers import TransformerEncoder, build_encoder, padded_layout, run_encoder
from scgpt.model.linear_attention import FastTransformerEncoderWrapper
from scgpt.model.packed import PackedTensors

_NORM_EPS = 6.1e-5  # of the batch norms: about the smallest normal float16, as upstream


class KeepsGeneEmbeddings(nn.Module):
    """A model that keeps the gene embeddings of its last padded batch, which upstream's MVC reads from there.

    Copies and pickles go without: the tensor hangs on a graph, which cannot be copied.
    """

    cur_gene_token_embs: Tensor  # (batch, seq, d_model)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "cur_gene_token_embs"}


class CellEncoder(KeepsGeneEmbeddings):
    """The part of a model that knows how a batch is laid out. Arguments as TransformerModel's."""

    def __init__(self, ntoken: int, d_model: int, nhead: int, d_hid: int, nlayers: int, *, padding_idx: int,
                 dropout: float, pad_value: int, use_batch_labels: bool, n_labels: int,
                 domain_spec_batchnorm: bool | str, input_emb_style: str, n_input_bins: int | None,
                 backend: str | None, pre_norm: bool, generative: bool, attention_dropout: float | None,
                 attention_backend: str) -> None:
        super().__init__()
        self.d_model, self.input_emb_style = d_model, input_emb_style
        self.use_batch_labels, self.domain_spec_batchnorm = use_batch_labels, domain_spec_batchnorm
        self.norm_scheme = "pre" if pre_norm else "post"
        self.use_generative_training = generative
        self.encoder = GeneEncoder(ntoken, d_model, padding_idx=padding_idx)
        if generative:
            self.flag_encoder = nn.Embedding(2, d_model)
        self.value_encoder = _value_encoder(input_emb_style, d_model, dropout, n_input_bins, pad_value)
        if use_batch_labels:
            self.batch_encoder = BatchLabelEncoder(n_labels, d_model)
        if domain_spec_batchnorm is True or domain_spec_batchnorm == "dsbn" or (domain_spec_batchnorm and generative):
            self.dsbn = DomainSpecificBatchNorm1d(d_model, n_labels, eps=_NORM_EPS,
                                                  affine=domain_spec_batchnorm == "do_affine")
        elif domain_spec_batchnorm == "batchnorm":
            self.bn = BatchNorm1d(d_model, eps=_NORM_EPS)
        self.transformer_encoder = build_encoder(
            d_model, nhead, d_hid, nlayers, dropout, backend=backend, norm_scheme=self.norm_scheme,
            attention_dropout=attention_dropout, attention_backend=attention_backend)
        if generative and isinstance(self.transformer_encoder, FastTransformerEncoderWrapper):
            raise ValueError("generative training needs softmax attention: use fast_transformer_backend='flash'")

    def _embed(self, src: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """(...) ids and values -> layer input and gene embeddings, (..., d_model) each; no values: gene alone."""
        genes = self.encoder(src)
        if values is None:
            return genes, genes
        encoded = self.value_encoder(values)
        return genes * encoded.unsqueeze(-1) if self.input_emb_style == "scaling" else genes + encoded, genes

    def _normalise(self, embs: Tensor, batch_labels: Tensor | None) -> Tensor:
        """Batch norm over (batch, seq, d_model) or (tokens, d_model); the first cell's label chooses the domain."""
        channels_second = embs.transpose(1, 2) if embs.dim() == 3 else embs
        if hasattr(self, "dsbn") and batch_labels is not None:
            channels_second = self.dsbn(channels_second, int(batch_labels[0]))
        elif hasattr(self, "bn"):
            channels_second = self.bn(channels_second)
        return channels_second.transpose(1, 2) if embs.dim() == 3 else channels_second

    def _encode_padded(self, src: Tensor, values: Tensor | None, mask: Tensor | None, batch_labels: Tensor | None,
                       input_cell_emb: Tensor | None = None) -> Hidden:
        embs, genes = self._embed(src, values)
        embs = _prompted(self._normalise(embs, batch_labels), input_cell_emb)
        return Hidden(run_encoder(self.transformer_encoder, embs, padded_layout(embs, mask), None), genes, None)

    def _encode_packed(self, packed: PackedTensors, batch_labels: Tensor | None, input_cell_emb: Tensor | None,
                       chosen: Chosen | None = None) -> Hidden:
        if packed.perception_index is None:
            embs, genes = self._embed(packed.gene_ids, packed.values)
            embs = self._normalise(embs, batch_labels)
        else:
            embs, genes = self._embed_parts(packed, packed.perception_index, batch_labels)
        if input_cell_emb is not None:
            embs = embs.index_copy(0, packed.cu_seqlens[:-1].long(), input_cell_emb.to(embs.dtype))
        output = run_encoder(self.transformer_encoder, embs, packed.layout(), packed,
                             None if chosen is None else chosen.tokens)
        return Hidden(output, genes, packed, chosen)

    def _chosen(self, packed: PackedTensors, positions: Tensor | None) -> Chosen | None:
        """What the last layer may leave out all else for, where only `positions` and the cells' first tokens count."""
        encoder = self.transformer_encoder
        if positions is None or packed.perception_index is not None or not isinstance(encoder, TransformerEncoder):
            return None
        return Chosen.of(packed, positions) if encoder.num_layers else None

    def _embed_parts(self, packed: PackedTensors, perception: Tensor,
                     batch_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Layer input (tokens, d_model): gene + value at perception tokens, gene + flag at generation tokens."""
        genes = self.encoder(packed.gene_ids)
        encoded = self.value_encoder(packed.values.index_select(0, perception)).to(genes.dtype)
        flags = self._generation_flag().to(genes.dtype).expand_as(genes)
        embs = genes + flags.index_copy(0, perception, encoded)
        if hasattr(self, "dsbn"):
            generation = torch.ones_like(embs[:, 0]).index_fill(0, perception, 0.0).nonzero().squeeze(1)
            parts = [self._normalise(embs.index_select(0, part), batch_labels)
                     for part in (perception, generation) if len(part)]
            embs = torch.cat(parts).index_select(0, torch.cat([perception, generation]).argsort())
        return embs, genes

    def _encode_parts(self, src: Tensor, values: Tensor | None, mask: Tensor | None, gen_genes: Tensor | None,
                      gen_mask: Tensor | None, batch_labels: Tensor | None, input_cell_emb: Tensor | None) -> Hidden:
        """[perception, generation] side by side, (batch, seq_p + seq_g, d_model)."""
        embs, genes = self._embed(src, values)
        embs = _prompted(self._normalise(embs, batch_labels), input_cell_emb)
        layout = padded_layout(embs, mask)
        if gen_genes is not None:
            gen_embs = self.encoder(gen_genes)
            genes = torch.cat([genes, gen_embs], 1)
            embs = torch.cat([embs, self._normalise(gen_embs + self._generation_flag(), batch_labels)], 1)
            is_generation = padded_layout(gen_embs, gen_mask).is_key
            layout = PaddedLayout(torch.cat([layout.is_key, torch.zeros_like(is_generation)], 1),
                                  torch.cat([torch.zeros_like(layout.is_key), is_generation], 1))
        return Hidden(run_encoder(self.transformer_encoder, embs, layout, None), genes, None)

    def _generation_flag(self) -> Tensor:
        """(d_model,): what a generation token carries instead of a value. Through the module, whose hooks gather it."""
        flag: Tensor = self.flag_encoder(torch.ones((), dtype=torch.long, device=self.flag_encoder.weight.device))
        return flag


def _value_encoder(style: str, d_model: int, dropout: float, n_input_bins: int | None, pad_value: int) -> nn.Module:
    if style == "continuous":
        return ContinuousValueEncoder(d_model, dropout)
    if style == "scaling":
        return nn.Identity()
    if style != "category":
        raise ValueError(f"unknown input_emb_style '{style}': use 'continuous', 'category' or 'scaling'")
    if not n_input_bins or n_input_bins < 1:
        raise ValueError("input_emb_style='category' needs n_input_bins, the number of categories")
    return CategoryValueEncoder(n_input_bins, d_model, padding_idx=pad_value)


def _prompted(embs: Tensor, cell_emb: Tensor | None) -> Tensor:
    """(batch, seq, d_model) with `cell_emb` (batch, d_model) in the first position."""
    return embs if cell_emb is None else torch.cat([cell_emb.unsqueeze(1).to(embs.dtype), embs[:, 1:]], 1)
