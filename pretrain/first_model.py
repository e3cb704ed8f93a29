"""The model that a run begins with: its first weights, and how it computes.

Every rank draws the same weights, from the seed alone. The layers of a model are copies of one, so that in ZeRO 3 a
rank never holds more than the embedding, the decoders, two layers and its share of all parameters: see
`draw_in_shares`. Linear layers are no copies: each continues the draw of the one before, and the decoders that of the
last, so that a rank would have to draw all of them twice to keep its share alone; it draws the whole model.
"""
import copy
import os
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pretrain.config import RunConfig, TrainConfig
from scgpt.errors import ConfigError
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from scgpt.model.layers import FlashSelfAttention, TorchSelfAttention
from scgpt.rng import GOLDEN, PURPOSE_WEIGHTS, stream
from scgpt.vocab import GeneVocab

SEED_BITS = (1 << 63) - 1   # what torch takes


def torch_seed(seed: int, step: int, number: int, purpose: np.uint64) -> int:
    """A seed of torch's generator from a stream of ours."""
    return int(stream(seed, step, number, purpose) ^ GOLDEN) & SEED_BITS


def first_model(config: TrainConfig, vocab: GeneVocab, *, device: torch.device, dtype: torch.dtype,
                deepspeed_json: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a configuration with its first weights, switched to how the run wants it to compute.

    On the CPU in float32; in ZeRO 3 already in shares, in `dtype` and where `deepspeed_json` wants them.
    """
    torch.manual_seed(torch_seed(config.train.seed, 0, 0, PURPOSE_WEIGHTS))
    if config.deepspeed.zero_stage == 3 and config.model.layers != "linear":
        model = draw_in_shares(config.model, vocab, device=device, dtype=dtype, deepspeed_json=deepspeed_json)
    else:
        model = build_model(config.model, vocab)
    switch(model, config.train)
    return model


def draw_in_shares(config: ModelConfig, vocab: GeneVocab, *, device: torch.device, dtype: torch.dtype,
                   deepspeed_json: Mapping[str, Any]) -> torch.nn.Module:
    """The weights of `build_model(config, vocab)`, to the bit, of which each rank keeps its share. All ranks call it.

    A model of one layer is drawn, and its copies join it one after the other, each cut into shares at once.
    """
    import deepspeed

    model: torch.nn.Module = build_model(config.model_copy(update={"n_layers": 1}), vocab)
    encoder = model.get_submodule("transformer_encoder")
    layers: Any = encoder.layers
    drawn = copy.deepcopy(layers[0])
    _place(model, device, dtype)
    deepspeed.zero.Init(module=model, config_dict_or_path=dict(deepspeed_json), dtype=dtype)
    cut: Any = next(model.parameters())   # any parameter in shares can cut others as it was cut
    for _ in range(config.n_layers - 1):
        layer = copy.deepcopy(drawn)
        _place(layer, device, dtype)
        cut.convert_to_zero_parameters(param_list=list(layer.parameters()))
        layers.append(layer)
    encoder.num_layers = config.n_layers  # type: ignore[assignment]
    return model


def _place(module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Weights in `dtype`; buffers stay in their own, as DeepSpeed leaves them."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def switch(model: torch.nn.Module, settings: RunConfig) -> None:
    """Recompute, compile, determinism: how the model computes, not what.

    Raises ConfigError where there is no compiler to compile with.
    """
    encoder = model.get_submodule("transformer_encoder")
    if settings.recompute:
        encoder.recompute = True  # type: ignore[assignment]
    if settings.compile:
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            raise ConfigError(f"train.compile needs a C++ compiler, and there is no '{compiler}'",
                              fix="install g++, or set train.compile=false")
        for layer in encoder.layers:  # type: ignore[union-attr]
            layer.compile(dynamic=True)   # no other graph for another number of tokens
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # what cuBLAS asks for
        for module in encoder.modules():
            if isinstance(module, (FlashSelfAttention, TorchSelfAttention)):
                module.deterministic = True
    torch.use_deterministic_algorithms(settings.deterministic)
