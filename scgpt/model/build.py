"""build_model: from a ModelConfig and a vocabulary to a module."""
from collections.abc import Mapping

import torch

from scgpt.model.config import ModelConfig
from scgpt.model.generation_model import TransformerGenerator
from scgpt.model.model import TransformerModel
from scgpt.vocab import PAD


def build_model(config: ModelConfig, vocab: Mapping[str, int], *,
                device: torch.device | str | None = None) -> TransformerModel | TransformerGenerator:
    """The model that `config` describes, freshly initialised, in training mode.

    Args:
        config: its shape.
        vocab: token -> id; its length is the size of the gene embedding, and it must hold `<pad>`.
        device: where the parameters are made; "meta" makes them without memory, for counting or for loading weights.
    """
    with torch.device(device if device is not None else torch.get_default_device()):
        return _generator(config, vocab) if config.kind == "generator" else _transformer(config, vocab)


def _transformer(config: ModelConfig, vocab: Mapping[str, int]) -> TransformerModel:
    return TransformerModel(
        ntoken=len(vocab), d_model=config.d_model, nhead=config.n_heads, d_hid=config.d_hid, nlayers=config.n_layers,
        nlayers_cls=config.n_layers_cls, n_cls=config.n_cls, vocab=vocab, dropout=config.dropout, pad_token=PAD,
        pad_value=config.pad_value, do_mvc=config.mvc, do_dab=config.dab, use_batch_labels=config.use_batch_labels,
        num_batch_labels=config.n_batch_labels, domain_spec_batchnorm=config.domain_spec_batchnorm,
        input_emb_style=config.input_emb_style, n_input_bins=config.n_input_bins, cell_emb_style=config.cell_emb_style,
        mvc_decoder_style=config.mvc_decoder_style, ecs_threshold=config.ecs_threshold,
        explicit_zero_prob=config.explicit_zero_prob, use_fast_transformer=config.layers != "torch",
        fast_transformer_backend="linear" if config.layers == "linear" else "flash", pre_norm=config.pre_norm,
        use_generative_training=config.generative, attention_dropout=config.attention_dropout,
        attention_backend=config.attention_backend)


def _generator(config: ModelConfig, vocab: Mapping[str, int]) -> TransformerGenerator:
    return TransformerGenerator(
        ntoken=len(vocab), d_model=config.d_model, nhead=config.n_heads, d_hid=config.d_hid, nlayers=config.n_layers,
        nlayers_cls=config.n_layers_cls, n_cls=config.n_cls, vocab=vocab, dropout=config.dropout, pad_token=PAD,
        pad_value=config.pad_value, do_mvc=config.mvc, n_input_bins=config.n_input_bins or 0,
        cell_emb_style=config.cell_emb_style, mvc_decoder_style=config.mvc_decoder_style,
        decoder_activation=config.decoder_activation, decoder_adaptive_bias=config.decoder_adaptive_bias,
        ecs_threshold=config.ecs_threshold, explicit_zero_prob=config.explicit_zero_prob,
        use_fast_transformer=config.layers != "torch",
        fast_transformer_backend="linear" if config.layers == "linear" else "flash", pre_norm=config.pre_norm,
        attention_dropout=config.attention_dropout, attention_backend=config.attention_backend)
