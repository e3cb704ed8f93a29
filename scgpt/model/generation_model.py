"""TransformerGenerator: expression after a perturbation, from expression before and a flag on each perturbed gene.

Padded input as upstream's, or PackedTensors with flags; no `cell_emb` in the result, as upstream.
"""
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scgpt.loss import elastic_cell_similarity
from scgpt.model.cell_encoder import KeepsGeneEmbeddings
from scgpt.model.decoders import AffineExprDecoder, ClsDecoder, MVCDecoder, Similarity
from scgpt.model.encoders import ContinuousValueEncoder, GeneEncoder, PositionalEncoding
from scgpt.model.heads import POOLING_STYLES, Hidden, decode_mvc, mean_nonzero, pool, sampled
from scgpt.model.layers import build_encoder, padded_layout, run_encoder
from scgpt.model.model import generate_square_subsequent_mask
from scgpt.model.packed import PackedTensors
from scgpt.model.row_bins import bin_row

__all__ = ["AffineExprDecoder", "ClsDecoder", "GeneEncoder", "PositionalEncoding", "Similarity", "TransformerGenerator",
           "generate_square_subsequent_mask"]


class TransformerGenerator(KeepsGeneEmbeddings):
    """The perturbation model. Parameters, defaults and state-dict names are upstream's; ours are keyword-only.

    `domain_spec_batchnorm` and `CCE` have no effect, as upstream. Arguments as TransformerModel's, but for:

    Args:
        pert_pad_id: which of the three flags (0, 1, 2) is padding: its embedding is never trained.
        n_input_bins: above 0: values are binned cell by cell before they are encoded; decoders use them as they are.
        decoder_activation: class of torch.nn for coefficient and bias.
        decoder_adaptive_bias: bias times the mean of the cell's non-zero values.
        explicit_zero_prob: decoders also give the probability of a non-zero value; eval mode then samples.
    """

    def __init__(self, ntoken: int, d_model: int, nhead: int, d_hid: int, nlayers: int, nlayers_cls: int, n_cls: int,
                 vocab: Mapping[str, int] | Any, dropout: float = 0.5, pad_token: str = "<pad>", pad_value: int = 0,  # noqa: S107
                 pert_pad_id: int = 2, do_mvc: bool = False, domain_spec_batchnorm: bool | str = False,  # noqa: FBT001, FBT002 upstream
                 n_input_bins: int | None = 0, cell_emb_style: str = "cls", mvc_decoder_style: str = "inner product",
                 decoder_activation: str | None = None, decoder_adaptive_bias: bool = False,  # noqa: FBT001, FBT002 upstream
                 ecs_threshold: float = 0.3, explicit_zero_prob: bool = False,  # noqa: FBT001, FBT002 upstream
                 use_fast_transformer: bool = False, fast_transformer_backend: str = "flash", pre_norm: bool = False, *,  # noqa: FBT001, FBT002 upstream
                 attention_dropout: float | None = None, attention_backend: str = "auto") -> None:
        super().__init__()
        if cell_emb_style not in POOLING_STYLES:
            raise ValueError(f"unknown cell_emb_style '{cell_emb_style}': use one of {', '.join(POOLING_STYLES)}")
        self.model_type, self.d_model, self.pad_token_id = "Transformer", d_model, vocab[pad_token]
        self.pad_token, self.pad_value, self.pert_pad_id = pad_token, pad_value, pert_pad_id
        self.ecs_threshold, self.domain_spec_batchnorm = ecs_threshold, domain_spec_batchnorm
        self.n_input_bins, self.cell_emb_style = n_input_bins or 0, cell_emb_style
        self.explicit_zero_prob, self.use_fast_transformer = explicit_zero_prob, use_fast_transformer
        self.norm_scheme = "pre" if pre_norm else "post"
        self.encoder = GeneEncoder(ntoken, d_model, padding_idx=vocab[pad_token])
        self.value_encoder = ContinuousValueEncoder(d_model, dropout)
        self.pert_encoder = nn.Embedding(3, d_model, padding_idx=pert_pad_id)
        self.transformer_encoder = build_encoder(
            d_model, nhead, d_hid, nlayers, dropout, backend=fast_transformer_backend if use_fast_transformer else None,
            norm_scheme=self.norm_scheme, attention_dropout=attention_dropout, attention_backend=attention_backend)
        self.decoder = AffineExprDecoder(d_model, explicit_zero_prob=explicit_zero_prob, activation=decoder_activation,
                                         adaptive_bias=decoder_adaptive_bias)
        self.cls_decoder = ClsDecoder(d_model, n_cls, nlayers=nlayers_cls)
        if do_mvc:
            self.mvc_decoder = MVCDecoder(d_model, arch_style=mvc_decoder_style, explicit_zero_prob=explicit_zero_prob)
        self.sim = Similarity(temp=0.5)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the gene embedding from U(-0.1, 0.1), the padding row too, as upstream."""
        nn.init.uniform_(self.encoder.embedding.weight, -0.1, 0.1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`; a packed batch stands alone."""
        if len(args) == 1 and isinstance(args[0], PackedTensors):
            args = (*args, None, None, None)
        return super().__call__(*args, **kwargs)

    def forward(self, src: Tensor | PackedTensors, values: Tensor | None, input_pert_flags: Tensor | None,
                src_key_padding_mask: Tensor | None, CLS: bool = False, CCE: bool = False, MVC: bool = False,  # noqa: FBT001, FBT002, N803 upstream
                ECS: bool = False, do_sample: bool = False, *,  # noqa: FBT001, FBT002, N803 upstream
                positions: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions for cells: mlm_output; cls_output with CLS, mvc_output with MVC, loss_ecs with ECS.

        Padded: `src` (batch, seq) int64, `values` (batch, seq), `input_pert_flags` (batch, seq) int64,
        `src_key_padding_mask` (batch, seq) bool, True = padding; outputs (batch, seq). Packed: `model(packed)` with
        `pert_flags`; outputs (tokens,), or (positions,) where `positions` chooses tokens. With explicit zero
        probabilities also mlm_zero_probs and mvc_zero_probs, and outside training the outputs are sampled.
        """
        do_sample = do_sample or (self.explicit_zero_prob and not self.training)
        if isinstance(src, PackedTensors):
            hidden, raw = self._encode_packed(src), src.values
        elif values is None or input_pert_flags is None:
            raise ValueError("padded input needs src, values and input_pert_flags")
        else:
            encoded, raw = self._encode(src, self._binned(values), input_pert_flags, src_key_padding_mask), values
            hidden = Hidden(encoded, self.cur_gene_token_embs, None)
        decoded = self._decode(hidden, raw, positions)
        output = {"mlm_output": sampled(decoded, do_sample=do_sample)}
        if self.explicit_zero_prob:
            output["mlm_zero_probs"] = decoded["zero_probs"]
        cell_emb = pool(hidden.output, self.cell_emb_style, raw, hidden.packed)
        if CLS:
            output["cls_output"] = self.cls_decoder(cell_emb)
        if MVC:
            if not hasattr(self, "mvc_decoder"):
                raise ValueError("MVC=True needs a model built with do_mvc=True")
            decoded = decode_mvc(self.mvc_decoder, cell_emb, hidden, positions)
            output["mvc_output"] = sampled(decoded, do_sample=do_sample)
            if self.explicit_zero_prob:
                output["mvc_zero_probs"] = decoded["zero_probs"]
        if ECS:
            output["loss_ecs"] = elastic_cell_similarity(cell_emb, self.ecs_threshold)
        return output

    def _binned(self, values: Tensor) -> Tensor:
        """What is encoded of padded rows."""
        return _binned(list(values), self.n_input_bins).view_as(values) if self.n_input_bins else values

    def _encode_packed(self, packed: PackedTensors) -> Hidden:
        if packed.pert_flags is None:
            raise ValueError("TransformerGenerator needs pert_flags in a packed batch")
        values = packed.values
        if self.n_input_bins:
            values = _binned(values.split(packed.cu_seqlens.diff().tolist()), self.n_input_bins)
        genes = self.encoder(packed.gene_ids)
        embs = genes + self.value_encoder(values) + self.pert_encoder(packed.pert_flags)
        return Hidden(run_encoder(self.transformer_encoder, embs, packed.layout(), packed), genes, packed)

    def _encode(self, src: Tensor, values: Tensor, input_pert_flags: Tensor,
                src_key_padding_mask: Tensor | None) -> Tensor:
        """Hidden vectors (batch, seq, d_model) of padded cells, values as they are encoded; keeps gene embeddings."""
        genes = self.cur_gene_token_embs = self.encoder(src)
        embs = genes + self.value_encoder(values) + self.pert_encoder(input_pert_flags)
        return run_encoder(self.transformer_encoder, embs, padded_layout(embs, src_key_padding_mask), None)

    def _get_cell_emb_from_layer(self, layer_output: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cell embeddings (batch, d_model) of hidden vectors (batch, seq, d_model), as upstream."""
        return pool(layer_output, self.cell_emb_style, weights, None)

    def _decode(self, hidden: Hidden, values: Tensor, positions: Tensor | None) -> dict[str, Tensor]:
        means = None if hidden.packed is None else mean_nonzero(values, hidden.packed)
        if positions is not None and means is not None:
            values, means = values.index_select(0, positions), means.index_select(0, positions)
        output: dict[str, Tensor] = self.decoder(hidden.at(positions).output, values, mean_nonzero=means)
        return output

    def encode_batch(self, src: Tensor, values: Tensor, src_key_padding_mask: Tensor, batch_size: int,
                     output_to_cpu: bool = True, *, input_pert_flags: Tensor | None = None) -> Tensor:  # noqa: FBT001, FBT002 upstream
        """Hidden vectors (cells, seq, d_model) float32 of many cells, `batch_size` at a time, without gradient.

        `input_pert_flags` (cells, seq): None means that nothing is perturbed. Upstream's method cannot run.
        """
        device = next(self.parameters()).device
        flags = torch.zeros_like(src) if input_pert_flags is None else input_pert_flags
        inputs = (src, self._binned(values), flags, src_key_padding_mask)
        batches = zip(*(x.split(batch_size) for x in inputs), strict=True)
        parts = [self._encode(*(x.to(device) for x in batch)).detach().float() for batch in batches]
        return torch.cat([part.cpu() if output_to_cpu else part for part in parts])

    def pred_perturb(self, batch_data: Any, include_zero_gene: str = "batch-wise",
                     gene_ids: np.ndarray[Any, Any] | Sequence[int] | None = None,
                     amp: bool = True) -> Tensor:  # noqa: FBT001, FBT002 upstream
        """Expression (cells, genes) after perturbation; sets eval mode.

        Args:
            batch_data: graph batch: `x` (cells x genes, 2) values and flags, `pert` one entry a cell, `to(device)`.
            include_zero_gene: "all" genes, or "batch-wise": those that any cell of the batch expresses, the rest 0.
            gene_ids: (genes,) vocabulary ids of the columns.
            amp: autocast on CUDA.
        """
        if include_zero_gene not in ("all", "batch-wise"):
            raise ValueError(f"include_zero_gene must be 'all' or 'batch-wise', not {include_zero_gene!r}")
        if gene_ids is None:
            raise AssertionError("pred_perturb needs gene_ids, the vocabulary ids of the columns")
        self.eval()
        device = next(self.parameters()).device
        batch_data.to(device)
        x: Tensor = batch_data.x
        before = x[:, 0].reshape(len(batch_data.pert), -1)
        flags = x[:, 1].long().reshape(before.shape)
        columns = torch.arange(before.shape[1], device=device)
        if include_zero_gene == "batch-wise":
            columns = columns[(before != 0).any(0)]
        genes = torch.as_tensor(np.asarray(gene_ids), dtype=torch.long, device=device)[columns].expand(len(before), -1)
        values = before[:, columns]
        with torch.autocast(device.type, enabled=amp and device.type == "cuda"):
            output = self(genes, values, flags[:, columns], torch.zeros_like(values, dtype=torch.bool), do_sample=True)
        return torch.zeros_like(before).index_copy(1, columns, output["mlm_output"].to(before.dtype))


def _binned(cells: Sequence[Tensor], n_bins: int) -> Tensor:
    """Bins of the values of each cell, as floats, end to end."""
    bins = [torch.from_numpy(bin_row(cell.detach().cpu().numpy(), n_bins)) for cell in cells]
    return torch.cat(bins).to(cells[0].device, cells[0].dtype)
