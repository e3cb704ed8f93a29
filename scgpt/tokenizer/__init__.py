"""Upstream's import path of the vocabulary, which lives in `scgpt.vocab`, and of its batches for fine-tuning."""
from scgpt.tokenizer.gene_tokenizer import (
    GeneVocab,
    pad_batch,
    random_mask_value,
    tokenize_and_pad_batch,
    tokenize_batch,
)

__all__ = ["GeneVocab", "pad_batch", "random_mask_value", "tokenize_and_pad_batch", "tokenize_batch"]
