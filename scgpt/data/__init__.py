"""Token-dataset format, version 1: corpora on disk, written and read. NumPy and pyarrow only; no torch, no ray."""
from scgpt.data.dataset import TokenDataset
from scgpt.data.manifest import Manifest
from scgpt.data.schema import FORMAT, FORMAT_VERSION, RaggedBatch
from scgpt.data.verify import verify_corpus

__all__ = ["FORMAT", "FORMAT_VERSION", "Manifest", "RaggedBatch", "TokenDataset", "verify_corpus"]
