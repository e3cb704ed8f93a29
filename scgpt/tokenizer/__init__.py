"""Upstream's import path of the vocabulary, which lives in `scgpt.vocab`."""
from scgpt.vocab import GeneVocab

__all__ = ["GeneVocab"]
