"""The models of the scGPT family, with upstream's import paths, signatures, state-dict names and numbers.

Attributes are imported on first use, so that `scgpt.model.config` works without torch.
"""
import importlib

_HOME = {"TransformerModel": "model", "TransformerGenerator": "generation_model", "PackedTensors": "packed",
         "ModelConfig": "config", "build_model": "build", "varlen_attention": "attention",
         "generate_iteratively": "iterative",
         "AdversarialDiscriminator": "model", "BatchLabelEncoder": "model", "CategoryValueEncoder": "model",
         "ClsDecoder": "model", "ContinuousValueEncoder": "model", "ExprDecoder": "model",
         "FastTransformerEncoderWrapper": "model", "FlashTransformerEncoderLayer": "model", "GeneEncoder": "model",
         "MVCDecoder": "model", "PositionalEncoding": "model", "Similarity": "model",
         "generate_square_subsequent_mask": "model", "AffineExprDecoder": "generation_model",
         "DomainSpecificBatchNorm1d": "dsbn", "DomainSpecificBatchNorm2d": "dsbn", "GradReverse": "grad_reverse"}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"scgpt.model.{_HOME[name]}"), name)
    raise AttributeError(f"module 'scgpt.model' has no attribute '{name}'")
