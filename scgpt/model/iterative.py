"""Generation in rounds: predict all unknown genes, believe the most confident share, predict the rest from more.

A generative model predicts every generation token at once, each from the perception tokens alone. In rounds, what was
predicted with confidence becomes perception for what was not (as in the scGPT paper, Cui et al., Nature Methods 2024,
and MaskGIT before it). One round is the plain forward.
"""
from dataclasses import replace

import torch
from torch import Tensor

from scgpt.model.encoders import CategoryValueEncoder
from scgpt.model.model import TransformerModel
from scgpt.model.packed import PackedTensors


@torch.no_grad()
def generate_iteratively(model: TransformerModel, packed: PackedTensors, n_rounds: int = 4, *,
                         input_cell_emb: Tensor | None = None) -> Tensor:
    """Values of all tokens, (tokens,) in the order of `packed`: perception as given, generation predicted.

    Args:
        model: generative, best in eval mode; its confidence is that of the zero probability, or, without explicit zero
            probabilities, the agreement of the expression and the MVC decoder.
        packed: cells split into perception and generation.
        n_rounds: in each, a cell's most confident 1 / (rounds left) of its unknown genes are settled.
        input_cell_emb: (cells, d_model) prompts, or None.

    Raises ValueError when the batch has no generation part, or the model nothing to tell confidence by.
    """
    if packed.cu_perception is None:
        raise ValueError("iterative generation needs a packed batch that was split into perception and generation")
    if n_rounds < 1:
        raise ValueError(f"n_rounds must be at least 1, not {n_rounds}")
    use_mvc = not model.explicit_zero_prob and n_rounds > 1
    if use_mvc and not hasattr(model, "mvc_decoder"):
        raise ValueError("confidence needs explicit_zero_prob=True or do_mvc=True: build the model with one of them")
    place = torch.arange(len(packed.gene_ids), device=packed.gene_ids.device)  # where each token came from
    known = packed.cu_perception.diff().long()
    lengths = packed.cu_seqlens.diff().long()
    for round_ in range(n_rounds):
        output = model(packed, MVC=use_mvc, input_cell_emb=input_cell_emb)
        confidence = (output["mlm_zero_probs"] - 0.5).abs() if model.explicit_zero_prob else (
            -(output["mlm_output"] - output["mvc_output"]).abs() if use_mvc else torch.zeros_like(output["mlm_output"]))
        order = _by_confidence(packed, confidence)
        predicted = output["mlm_output"].to(packed.values.dtype)
        if isinstance(model.value_encoder, CategoryValueEncoder):
            predicted = predicted.round().clamp(0, model.value_encoder.embedding.num_embeddings - 1)
        values = torch.where(_unknown(packed), predicted, packed.values)
        packed = replace(packed, gene_ids=packed.gene_ids[order], values=values[order])
        place = place[order]
        known = known + (lengths - known + n_rounds - round_ - 1).div(n_rounds - round_, rounding_mode="floor")
        packed = packed.split(known)
    return torch.empty_like(packed.values).index_copy(0, place, packed.values)


def _unknown(packed: PackedTensors) -> Tensor:
    mask = packed.is_generation
    return mask if mask is not None else torch.zeros(len(packed.gene_ids), dtype=torch.bool)


def _by_confidence(packed: PackedTensors, confidence: Tensor) -> Tensor:
    """(tokens,) int64: cell by cell, perception tokens in their order, then generation tokens, the surest first."""
    unknown = _unknown(packed)
    order = torch.where(unknown, -confidence, 0.0).argsort(stable=True)
    group = packed.cell_index * 2 + unknown.long()
    return order[group[order].argsort(stable=True)]
