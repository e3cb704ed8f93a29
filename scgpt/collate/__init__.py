"""The maths of a batch: sample, bin, mask, pack. NumPy and numba; no torch."""
from scgpt.collate.collator import CollateConfig, collate
from scgpt.collate.packing import PackedBatch

__all__ = ["CollateConfig", "PackedBatch", "collate"]
