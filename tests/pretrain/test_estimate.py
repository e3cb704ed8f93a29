from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader, to_tensors
from pretrain.engine import Engine
from pretrain.estimate import Flops, device_peak_tflops, peak_tflops
from pretrain.objectives import Objective
from pretrain.world import join_world
from scgpt.config import load_config
from scgpt.model import attention
from tests.pretrain import runs

# Wide enough that what the formula leaves out (the gradient that no input of the first layer needs) is below 1 %.
WIDE = ("model.d_model=64", "model.n_heads=4", "model.d_hid=96", "model.n_layers=3", "model.attention_backend=math",
        "batch.global_batch_size=8", "batch.micro_batch_size=4")
GENERATIVE = ("model.generative=true", "objective.task=both", "objective.cell_prompt_after=0")


@pytest.fixture(scope="module")
def corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_corpus(tmp_path_factory.mktemp("estimate") / "corpus")


@pytest.fixture(scope="module")
def world():
    with join_world(timeout_s=10) as joined:
        yield joined


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")   # of torch itself, when DeepSpeed imports it
@pytest.mark.parametrize("settings", [
    (),
    GENERATIVE,
    (*GENERATIVE, "model.mvc_decoder_style=concat query"),
    ("model.kind=generator", "model.mvc_decoder_style=sum query"),
    ("model.cell_emb_style=avg-pool", "model.explicit_zero_prob=true", "objective.weights.cce=1.0"),
    ("objective.weights.cce=1.0", "model.input_emb_style=category", "model.n_input_bins=53", "objective.mvc=false"),
], ids=lambda settings: " ".join(settings) or "masked")
def test_the_formula_is_what_torch_counts_in_the_real_step(corpus_dir, world, monkeypatch, settings):
    """Ragged packed attention included: its plain twin is opened to the counter, which cannot see into operators."""
    config = load_config(TrainConfig, "demo", [f"data.corpus={corpus_dir}", *runs.SETTINGS, *WIDE, *settings],
                         kind="pretrain")
    corpus = Corpus.open(config)
    monkeypatch.setattr(attention, "_packed", attention._packed._init_fn)
    engine = Engine(config, corpus.vocab, world)
    step = Loader.of_run(config, corpus, rank=0, world_size=1).load(0)
    counts = engine.objective.counts(step.micro_batches, step=0)
    with FlopCounterMode(display=False) as counter:
        for number, batch in zip(step.numbers, step.micro_batches, strict=True):
            engine.train(to_tensors(batch, "cpu"), step=0, micro_batch=number, counts=counts, lr=1e-3)
    found = Flops(config.model, Objective.of(config)).of_step(step.micro_batches, step=0)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_more_ranks_count_the_same_step(corpus_dir):
    config = load_config(TrainConfig, "demo", [f"data.corpus={corpus_dir}", *runs.SETTINGS], kind="pretrain")
    corpus = Corpus.open(config)
    flops = Flops(config.model, Objective.of(config))

    def counted(world_size: int) -> int:
        loaders = [Loader.of_run(config, corpus, rank=rank, world_size=world_size)
                   for rank in range(world_size)]
        return sum(flops.of_step(loader.load(3).micro_batches, step=3) for loader in loaders)

    assert counted(1) == counted(2) == counted(4) > 0


@pytest.mark.parametrize(("name", "precision", "tflops"), [
    ("NVIDIA H100 80GB HBM3", "bf16", 989.4), ("NVIDIA H100 PCIe", "fp16", 756.0), ("NVIDIA H200", "bf16", 989.4),
    ("NVIDIA A100-SXM4-80GB", "bf16", 312.0), ("NVIDIA A100-SXM4-80GB", "fp32", 19.5), ("NVIDIA L40S", "bf16", 362.0),
    ("NVIDIA GeForce RTX 4090", "bf16", 165.2), ("NVIDIA B200", "bf16", 2250.0), ("NVIDIA GB200", "bf16", 2500.0),
    ("NVIDIA A10G", "bf16", None), ("Some GPU", "bf16", None),
])
def test_a_gpu_is_known_by_the_words_of_its_name(name, precision, tflops):
    assert peak_tflops(name, precision) == tflops


def test_no_data_sheet_tells_the_peak_of_a_cpu():
    assert device_peak_tflops(torch.device("cpu"), "fp32") is None
