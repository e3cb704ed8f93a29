"""TransformerModel: embed genes and values, attend within cells, decode expression, class, MVC, domain.

Input is padded, as upstream's (`src`, `values`, `src_key_padding_mask`), or one PackedTensors; both go through
`forward` and give the same numbers for the same cells. With `use_generative_training` a cell has perception tokens
(gene + value) and generation tokens (gene + flag): perception attends to perception, a generation token to those and to
itself.
"""
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scgpt.loss import elastic_cell_similarity
from scgpt.model.cell_encoder import CellEncoder
from scgpt.model.decoders import AdversarialDiscriminator, ClsDecoder, ExprDecoder, MVCDecoder, Similarity
from scgpt.model.encoders import (
    BatchLabelEncoder,
    CategoryValueEncoder,
    ContinuousValueEncoder,
    GeneEncoder,
    PositionalEncoding,
)
from scgpt.model.heads import POOLING_STYLES, Hidden, decode_mvc, gather_cells, pool, sampled, spread
from scgpt.model.layers import FlashTransformerEncoderLayer
from scgpt.model.linear_attention import FastTransformerEncoderWrapper
from scgpt.model.packed import PackedTensors

__all__ = ["AdversarialDiscriminator", "BatchLabelEncoder", "CategoryValueEncoder", "ClsDecoder",
           "ContinuousValueEncoder", "ExprDecoder", "FastTransformerEncoderWrapper", "FlashTransformerEncoderLayer",
           "GeneEncoder", "MVCDecoder", "PositionalEncoding", "Similarity", "TransformerModel",
           "generate_square_subsequent_mask"]

_GENERATIVE_ARGUMENTS = ("src", "values", "src_key_padding_mask", "gen_genes", "gen_key_padding_mask", "batch_labels",
                         "CLS", "CCE", "MVC", "ECS", "do_sample", "input_cell_emb")


class TransformerModel(CellEncoder):
    """The scGPT model. Parameters, defaults and state-dict names are upstream's; ours are keyword-only, at the end.

    Args:
        ntoken: size of the vocabulary.
        d_model: width of a token.
        nhead: attention heads.
        d_hid: width of the feed-forward.
        nlayers: layers.
        nlayers_cls: layers of the class decoder.
        n_cls: classes.
        vocab: mapping that holds `pad_token`.
        dropout: everywhere but where `attention_dropout` says otherwise.
        pad_token: its embedding is never trained.
        pad_value: value at padding; with category input, the bin that is never trained.
        do_mvc: build the MVC decoder.
        do_dab: build the adversarial domain discriminator, over `num_batch_labels` domains.
        use_batch_labels: embed batch labels for the decoders.
        num_batch_labels: how many there are.
        domain_spec_batchnorm: True or "dsbn": one norm a domain; "batchnorm": one; "do_affine": none on main, one with
            weights a domain in generative models.
        input_emb_style: "continuous", "category" or "scaling".
        n_input_bins: categories, for "category".
        cell_emb_style: "cls", "avg-pool" or "w-pool".
        mvc_decoder_style: see MVCDecoder.
        ecs_threshold: of the ECS loss.
        explicit_zero_prob: decoders also give the probability of a non-zero value.
        use_fast_transformer: flash names (or the linear backend) instead of torch's names.
        fast_transformer_backend: "flash" or "linear".
        pre_norm: upstream's "pre" scheme; has no effect on torch-named layers.
        use_generative_training: upstream's pretraining model: flash names, flag embedding, no `cls_decoder` for one
            class.
        attention_dropout: of the attention probabilities; None: as `dropout`.
        attention_backend: one of `scgpt.model.attention.BACKENDS`.
    """

    def __init__(self, ntoken: int, d_model: int, nhead: int, d_hid: int, nlayers: int, nlayers_cls: int = 3,
                 n_cls: int = 1, vocab: Mapping[str, int] | Any | None = None, dropout: float = 0.5,
                 pad_token: str = "<pad>", pad_value: int = 0, do_mvc: bool = False, do_dab: bool = False,  # noqa: FBT001, FBT002, S107 upstream
                 use_batch_labels: bool = False, num_batch_labels: int | None = None,  # noqa: FBT001, FBT002 upstream
                 domain_spec_batchnorm: bool | str = False, input_emb_style: str = "continuous",  # noqa: FBT001, FBT002 upstream
                 n_input_bins: int | None = None, cell_emb_style: str = "cls",
                 mvc_decoder_style: str = "inner product", ecs_threshold: float = 0.3,
                 explicit_zero_prob: bool = False, use_fast_transformer: bool = False,  # noqa: FBT001, FBT002 upstream
                 fast_transformer_backend: str = "flash", pre_norm: bool = False, *,  # noqa: FBT001, FBT002 upstream
                 use_generative_training: bool = False, attention_dropout: float | None = None,
                 attention_backend: str = "auto") -> None:
        if vocab is None:
            raise ValueError(f"TransformerModel needs vocab, a mapping that holds '{pad_token}'")
        per_domain = domain_spec_batchnorm in (True, "dsbn") or (domain_spec_batchnorm and use_generative_training)
        if (use_batch_labels or do_dab or per_domain) and num_batch_labels is None:
            raise ValueError("use_batch_labels, do_dab and a norm for each domain need num_batch_labels")
        if cell_emb_style not in POOLING_STYLES:
            raise ValueError(f"unknown cell_emb_style '{cell_emb_style}': use one of {', '.join(POOLING_STYLES)}")
        fast, n_labels = use_fast_transformer or use_generative_training, num_batch_labels or 0
        super().__init__(
            ntoken, d_model, nhead, d_hid, nlayers, padding_idx=vocab[pad_token], dropout=dropout, pad_value=pad_value,
            use_batch_labels=use_batch_labels, n_labels=n_labels, domain_spec_batchnorm=domain_spec_batchnorm,
            input_emb_style=input_emb_style, n_input_bins=n_input_bins,
            backend=fast_transformer_backend if fast else None, pre_norm=pre_norm, generative=use_generative_training,
            attention_dropout=attention_dropout, attention_backend=attention_backend)
        self.model_type = "Transformer"
        self.pad_token, self.pad_value = pad_token, pad_value
        self.do_dab, self.ecs_threshold, self.cell_emb_style = do_dab, ecs_threshold, cell_emb_style
        self.explicit_zero_prob, self.use_fast_transformer = explicit_zero_prob, fast
        self.decoder = ExprDecoder(d_model, explicit_zero_prob=explicit_zero_prob, use_batch_labels=use_batch_labels)
        if n_cls > 1 or not use_generative_training:
            self.cls_decoder = ClsDecoder(d_model, n_cls, nlayers=nlayers_cls)
        if do_mvc:
            self.mvc_decoder = MVCDecoder(d_model, arch_style=mvc_decoder_style, explicit_zero_prob=explicit_zero_prob,
                                          use_batch_labels=use_batch_labels)
        if do_dab:
            self.grad_reverse_discriminator = AdversarialDiscriminator(d_model, n_cls=n_labels, reverse_grad=True)
        self.sim, self.creterion_cce = Similarity(temp=0.5), nn.CrossEntropyLoss()  # upstream's spelling
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the gene embedding from U(-0.1, 0.1), the padding row too, as upstream."""
        nn.init.uniform_(self.encoder.embedding.weight, -0.1, 0.1)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, which sees named arguments: a packed batch stands alone, generative positions have other names."""
        if len(args) == 1 and isinstance(args[0], PackedTensors):
            args = (*args, None, None)
        elif kwargs.get("generative_training") and len(args) > 3:
            names = _GENERATIVE_ARGUMENTS[3:]
            kwargs |= dict(zip(names, args[3:], strict=False))
            args = args[:3]
        return super().__call__(*args, **kwargs)

    def forward(self, src: Tensor | PackedTensors, values: Tensor | None, src_key_padding_mask: Tensor | None,
                batch_labels: Tensor | None = None, CLS: bool = False, CCE: bool = False, MVC: bool = False,  # noqa: FBT001, FBT002, N803 upstream
                ECS: bool = False, do_sample: bool = False, *, generative_training: bool = False,  # noqa: FBT001, FBT002, N803 upstream
                gen_genes: Tensor | None = None, gen_key_padding_mask: Tensor | None = None,
                input_cell_emb: Tensor | None = None, positions: Tensor | None = None) -> dict[str, Tensor]:
        """Predictions and losses of a batch; what is asked for is in the result.

        Padded: `src` (batch, seq) int64, `values` (batch, seq), `src_key_padding_mask` (batch, seq) bool, True =
        padding. Result: mlm_output (batch, seq), cell_emb (batch, d_model); cls_output (batch, n_cls) with CLS;
        mvc_output (batch, seq) with MVC; loss_ecs, loss_cce () with ECS, CCE; dab_output (batch, n_labels) where
        `do_dab`; mlm_zero_probs and mvc_zero_probs with explicit zero probabilities.

        Packed: `model(packed)`. (batch, seq) becomes (tokens,), or (positions,) where `positions` (n,) int64 chooses
        tokens; then the decoders compute nothing else. A batch that was `split` is generative.

        Generative, padded: `model(pcpt_genes, pcpt_values, pcpt_key_padding_mask, gen_genes, gen_key_padding_mask,
        batch_labels, CLS, CCE, MVC, ECS, do_sample, input_cell_emb, generative_training=True)`; `gen_genes` may be
        None.
        Result: pcpt_preds, gen_preds; mvc_output, zero_probs, mvc_zero_probs over [perception, generation].
        `input_cell_emb` (batch, d_model) replaces what enters the layers at each cell's first position.
        """
        if isinstance(src, PackedTensors):
            batch_labels = src.batch_labels if batch_labels is None else batch_labels
            weights: Tensor | None = src.values
        else:
            weights = values
        self._check_batch_labels(batch_labels)
        if generative_training or (isinstance(src, PackedTensors) and src.perception_index is not None):
            self._check_generative()
            weights = None

        def encode() -> Hidden:
            if isinstance(src, PackedTensors):
                chosen = self._chosen(src, positions) if self.cell_emb_style == "cls" else None
                return self._encode_packed(src, batch_labels, input_cell_emb, chosen)
            if generative_training:
                return self._encode_parts(src, values, src_key_padding_mask, gen_genes, gen_key_padding_mask,
                                          batch_labels, input_cell_emb)
            if input_cell_emb is None:   # through the method that subclasses of upstream's model override
                output = self._encode(src, values, src_key_padding_mask, batch_labels)
                return Hidden(output, self.cur_gene_token_embs, None)
            return self._encode_padded(src, values, src_key_padding_mask, batch_labels, input_cell_emb)

        hidden = encode()
        batch_emb = self.batch_encoder(batch_labels) if self.use_batch_labels else None
        output = self._decode(hidden, batch_emb, positions, do_sample=do_sample)
        cell_emb = hidden.pooled(self.cell_emb_style, weights)
        output["cell_emb"] = cell_emb
        if CLS:
            output["cls_output"] = self._class_of(cell_emb)
        if CCE:
            output["loss_cce"] = self._contrast(cell_emb, encode, weights)
        if MVC:
            output |= self._decode_mvc(cell_emb, hidden, batch_emb, positions, do_sample=do_sample)
        if ECS:
            output["loss_ecs"] = elastic_cell_similarity(cell_emb, self.ecs_threshold)
        if self.do_dab:
            output["dab_output"] = self.grad_reverse_discriminator(cell_emb)
        return output if isinstance(src, PackedTensors) or not generative_training else _in_parts(output, src.shape[1])

    def _check_generative(self) -> None:
        if not self.use_generative_training:
            raise ValueError("a generative batch needs a model built with use_generative_training=True")
        if self.input_emb_style == "scaling":
            raise ValueError("generative training is not defined for input_emb_style='scaling'")
        if self.cell_emb_style == "w-pool":
            raise ValueError("cell_emb_style='w-pool' needs a value for each token; generation tokens have none")

    def _check_batch_labels(self, batch_labels: Tensor | None) -> None:
        if self.use_batch_labels or self.domain_spec_batchnorm:
            if batch_labels is None:
                raise AssertionError("batch_labels are needed: the model has use_batch_labels or domain_spec_batchnorm")
        elif batch_labels is not None:
            raise ValueError("batch_labels were given to a model without use_batch_labels and domain_spec_batchnorm")

    def _encode(self, src: Tensor, values: Tensor | None, src_key_padding_mask: Tensor | None,
                batch_labels: Tensor | None = None) -> Tensor:
        """Hidden vectors (batch, seq, d_model) of padded cells; keeps `cur_gene_token_embs` for MVC, as upstream."""
        self._check_batch_labels(batch_labels)
        hidden = self._encode_padded(src, values, src_key_padding_mask, batch_labels)
        self.cur_gene_token_embs = hidden.gene_embs
        return hidden.output

    def _get_cell_emb_from_layer(self, layer_output: Tensor, weights: Tensor | None = None) -> Tensor:
        """Cell embeddings (batch, d_model) of hidden vectors (batch, seq, d_model), as upstream."""
        return pool(layer_output, self.cell_emb_style, weights, None)

    def _decode(self, hidden: Hidden, batch_emb: Tensor | None, positions: Tensor | None, *,
                do_sample: bool) -> dict[str, Tensor]:
        tokens = hidden.at(positions).output
        if batch_emb is not None:
            tokens = torch.cat([tokens, spread(batch_emb, hidden, positions)], -1)
        decoded = self.decoder(tokens)
        output = {"mlm_output": sampled(decoded, do_sample=do_sample)}
        if self.explicit_zero_prob:
            output["mlm_zero_probs"] = decoded["zero_probs"]
        return output

    def _decode_mvc(self, cell_emb: Tensor, hidden: Hidden, batch_emb: Tensor | None, positions: Tensor | None, *,
                    do_sample: bool) -> dict[str, Tensor]:
        if not hasattr(self, "mvc_decoder"):
            raise ValueError("MVC=True needs a model built with do_mvc=True")
        cells = cell_emb if batch_emb is None else torch.cat([cell_emb, batch_emb], 1)
        decoded = decode_mvc(self.mvc_decoder, cells, hidden, positions)
        output = {"mvc_output": sampled(decoded, do_sample=do_sample)}
        if self.explicit_zero_prob:
            output["mvc_zero_probs"] = decoded["zero_probs"]
        return output

    def _class_of(self, cell_emb: Tensor) -> Tensor:
        if not hasattr(self, "cls_decoder"):
            raise ValueError("CLS=True needs a class decoder: a generative model has one only when n_cls > 1")
        logits: Tensor = self.cls_decoder(cell_emb)
        return logits

    def _contrast(self, cell_emb: Tensor, encode: Callable[[], Hidden], weights: Tensor | None) -> Tensor:
        """CCE against a second pass over the same cells (Gao et al., SimCSE, 2021); over all ranks while training."""
        second = encode()
        views = [cell_emb, second.pooled(self.cell_emb_style, weights)]
        if self.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            views = [gather_cells(view) for view in views]
        similarity = self.sim(views[0].unsqueeze(1), views[1].unsqueeze(0))
        loss: Tensor = self.creterion_cce(similarity, torch.arange(len(similarity), device=similarity.device))
        return loss

    def generate(self, cell_emb: Tensor, src: Tensor, values: Tensor | None = None,
                 src_key_padding_mask: Tensor | None = None, gen_iters: int = 1,
                 batch_labels: Tensor | None = None) -> Tensor:
        """Expression (batch, seq) of genes `src` in cells with the embeddings `cell_emb` (batch, d_model).

        The embedding takes the place of the first token; one of (1, d_model) or (d_model,) serves every cell.
        `gen_iters` has no effect, as upstream. Missing labels are 0, and labels that the model has no use for are
        not used, both with a warning.
        """
        try:
            self._check_batch_labels(batch_labels)
        except AssertionError:
            warnings.warn("batch_labels are missing: every cell gets label 0", stacklevel=2)
            batch_labels = torch.zeros(len(src), dtype=torch.long, device=src.device)
        except ValueError as error:
            warnings.warn(f"{error}: they are not used", stacklevel=2)
        cell_emb = cell_emb.expand(len(src), -1)
        hidden = self._encode_padded(src, values, src_key_padding_mask, batch_labels, cell_emb)
        batch_emb = self.batch_encoder(batch_labels) if self.use_batch_labels else None
        return self._decode(hidden, batch_emb, None, do_sample=False)["mlm_output"]

    def encode_batch(self, src: Tensor, values: Tensor, src_key_padding_mask: Tensor, batch_size: int,
                     batch_labels: Tensor | None = None, output_to_cpu: bool = True, time_step: int | None = None,  # noqa: FBT001, FBT002 upstream
                     return_np: bool = False) -> Tensor | np.ndarray[Any, Any]:  # noqa: FBT001, FBT002 upstream
        """Hidden vectors of many cells, `batch_size` at a time: float32 (cells, seq, d_model).

        `time_step` keeps that position only: (cells, d_model). `return_np` gives an array, else a tensor, on the CPU
        with `output_to_cpu`. No gradient.
        """
        device = next(self.parameters()).device
        parts = []
        for start in range(0, max(len(src), 1), batch_size):
            batch = slice(start, start + batch_size)
            labels = None if batch_labels is None else batch_labels[batch].to(device)
            output = self._encode(src[batch].to(device), values[batch].to(device),
                                  src_key_padding_mask[batch].to(device), labels).detach()
            output = output if time_step is None else output[:, time_step, :]
            parts.append(output.float().cpu() if output_to_cpu or return_np else output.float())
        whole = torch.cat(parts)
        return whole.numpy() if return_np else whole


def _in_parts(output: dict[str, Tensor], n_perception: int) -> dict[str, Tensor]:
    """Upstream's keys of a generative forward over padded rows."""
    predictions = output.pop("mlm_output")
    output["pcpt_preds"], output["gen_preds"] = predictions[:, :n_perception], predictions[:, n_perception:]
    if "mlm_zero_probs" in output:
        output["zero_probs"] = output.pop("mlm_zero_probs")
    return output


def generate_square_subsequent_mask(sz: int) -> Tensor:
    """(sz, sz) float32: 0 on and below the diagonal, -inf above."""
    return torch.full((sz, sz), -torch.inf).triu(1)
