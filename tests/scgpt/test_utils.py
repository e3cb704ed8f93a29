"""load_pretrained: both directions of names, inputs left alone, what it says."""
import logging

import torch

from scgpt.model.layers import FlashTransformerEncoderLayer, TorchTransformerEncoderLayer
from scgpt.tokenizer import GeneVocab
from scgpt.tokenizer.gene_tokenizer import GeneVocab as SameVocab
from scgpt.utils import load_pretrained


def test_torch_names_load_into_a_flash_model():
    source, target = TorchTransformerEncoderLayer(8, 2, 10), FlashTransformerEncoderLayer(8, 2, 10)
    weights = source.state_dict()
    names = list(weights)
    assert load_pretrained(target, weights, verbose=False) is target
    assert torch.equal(target.self_attn.Wqkv.weight, source.self_attn.in_proj_weight)
    assert list(weights) == names


def test_what_is_left_out_is_logged(caplog):
    target = FlashTransformerEncoderLayer(8, 2, 10)
    with caplog.at_level(logging.INFO, logger="scgpt"):
        load_pretrained(target, {"linear1.bias": torch.zeros(3), "other": torch.zeros(1), "norm1.bias": torch.ones(8)})
    left_out, loaded = (record.getMessage() for record in caplog.records)
    assert "linear1.bias" in left_out
    assert "other" in left_out
    assert "norm1.bias" in loaded
    assert torch.equal(target.norm1.bias, torch.ones(8))


def test_vocabulary_has_one_definition():
    assert GeneVocab is SameVocab
