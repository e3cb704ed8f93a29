"""Floating-point operations of a training step, and what a device could do: the two sides of MFU.

A step's operations are those of its matrix products, a product of (m, k) and (k, n) being 2mkn, three times over: once
forward, twice backward (Chowdhery et al., PaLM, 2022, appendix B). What packing, the chosen positions of the last layer
and the perception keys of a generative batch leave out is not counted, and what `train.recompute` or a flash kernel
computes again is not either.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pretrain.objectives import CCE, CLS, MVC, Objective
from scgpt.collate import PackedBatch
from scgpt.model.config import ModelConfig

# Dense TFLOP/s of a matrix product by the vendor's data sheet: bf16 and fp16 with float32 sums, then fp32 (no TF32:
# torch leaves it off). A name matches where all of its words are in the device's; more words come first.
_PEAK_TFLOPS = {
    "H100 PCIe": (756.0, 51.0), "H100 NVL": (835.0, 60.0), "RTX 6000 Ada": (364.2, 91.1), "RTX 4090": (165.2, 82.6),
    "RTX 5090": (209.5, 104.8), "RTX 3090": (71.0, 35.6), "RTX A6000": (154.8, 38.7), "GB200": (2500.0, 80.0),
    "B200": (2250.0, 75.0), "GH200": (989.4, 66.9), "H200": (989.4, 66.9), "H100": (989.4, 66.9),
    "H800": (989.4, 66.9), "H20": (148.0, 44.0), "A100": (312.0, 19.5), "A800": (312.0, 19.5), "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5), "L4": (121.0, 30.3), "A40": (149.7, 37.4), "A10": (125.0, 31.2), "V100": (125.0, 15.7),
    "T4": (65.0, 8.1), "MI300X": (1307.4, 163.4),
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Dense TFLOP/s of a GPU by its data sheet, in the precision `bf16`, `fp16` or `fp32`; None: not in the table."""
    words = set(re.split(r"[\s-]+", device_name))
    for name, (half, single) in _PEAK_TFLOPS.items():
        if set(name.split()) <= words:
            return single if precision == "fp32" else half
    return None


def device_peak_tflops(device: torch.device, precision: str) -> float | None:
    """The same of a device of this process; None on a CPU, whose peak no data sheet tells."""
    return peak_tflops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


@dataclass(frozen=True)
class Flops:
    """Counts the floating-point operations of micro-batches under a model and its objective."""

    model: ModelConfig
    objective: Objective

    def of_step(self, batches: Sequence[PackedBatch], *, step: int) -> int:
        """Operations of forward and backward over some micro-batches; `step`: optimizer steps before this one."""
        return sum(3 * 2 * self._products(batch, step) for batch in batches)

    def _products(self, batch: PackedBatch, step: int) -> int:
        """Multiply-adds of a micro-batch's forward passes."""
        n_cells, n_targets = len(batch), batch.n_targets
        encoded = self._encoded(batch, batch.target_mask)
        total = encoded + self._decoder(n_targets) + self._cells(n_cells)
        if MVC in self.objective.weights:
            total += self._mvc(n_targets)
        if self.objective.prompts(step):
            total += encoded + self._decoder(n_targets)
        if CCE in self.objective.weights:   # the second view decodes nothing
            total += self._encoded(batch, np.zeros_like(batch.target_mask))
        return total

    def _encoded(self, batch: PackedBatch, is_read: np.ndarray) -> int:
        """Embedding and layers; after the last layer `is_read` (tokens,) and each cell's first token are read."""
        model, d = self.model, self.model.d_model
        lengths = np.diff(batch.cu_seqlens).astype(np.int64)
        keys = lengths if batch.perception_lengths is None else batch.perception_lengths.astype(np.int64)
        queries = lengths
        if self._reads_some(batch):
            queries = 1 + np.add.reduceat(is_read, batch.cu_seqlens[:-1], dtype=np.int64)
        n_tokens, n_values, n_queries = int(lengths.sum()), int(keys.sum()), int(queries.sum())
        total = n_values * (d + d * d) if model.kind == "generator" or model.input_emb_style == "continuous" else 0
        for rows, attending in ((n_tokens, lengths),) * (model.n_layers - 1) + ((n_queries, queries),):
            pairs = n_tokens * d // model.n_heads if model.layers == "linear" else int(attending @ keys)
            total += n_tokens * 3 * d * d + rows * (d * d + 2 * d * model.d_hid) + 2 * d * pairs
        return total

    def _reads_some(self, batch: PackedBatch) -> bool:
        """Whether the last layer computes chosen tokens only, see TransformerModel."""
        model = self.model
        return (batch.perception_lengths is None and model.kind == "transformer" and model.layers != "linear"
                and model.cell_emb_style == "cls")

    def _decoder(self, n_targets: int) -> int:
        model, d = self.model, self.model.d_model
        d_in = 2 * d if model.use_batch_labels else d
        heads = (2 if model.kind == "generator" else 1) * (2 if model.explicit_zero_prob else 1)
        return n_targets * heads * (d_in * d + d * d + d)

    def _mvc(self, n_targets: int) -> int:
        model, d = self.model, self.model.d_model
        if model.mvc_decoder_style == "concat query":
            return n_targets * (64 * d + (d + 64) * 64 + 64)
        if model.mvc_decoder_style == "sum query":
            return n_targets * (d * d + 64 * d + 64)
        d_in = 2 * d if model.use_batch_labels else d
        return n_targets * (d * d + (2 if model.explicit_zero_prob else 1) * d * d_in)

    def _cells(self, n_cells: int) -> int:
        """Heads that see cells."""
        model, d, total = self.model, self.model.d_model, 0
        if CLS in self.objective.weights:
            total += (model.n_layers_cls - 1) * d * d + d * model.n_cls
        if model.dab:
            total += 2 * d * d + d * (model.n_batch_labels or 0)
        return n_cells * total
