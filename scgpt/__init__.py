"""The scGPT library: token-dataset format, batch maths, model. Everything is loaded on first use (PEP 562)."""
import importlib
from importlib.metadata import PackageNotFoundError, version

_SUBMODULES = ("collate", "config", "data", "data_collator", "errors", "files", "loss", "model", "preprocess", "rng",
               "tokenizer", "utils", "vocab")
_NAMES = {"GeneVocab": "scgpt.vocab", "TokenDataset": "scgpt.data", "TransformerModel": "scgpt.model",
          "TransformerGenerator": "scgpt.model", "DataCollator": "scgpt.data_collator"}

try:
    __version__ = version("scgpt-pretrain")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [*_NAMES, *_SUBMODULES]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return importlib.import_module(f"scgpt.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'scgpt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
