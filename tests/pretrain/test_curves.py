"""The loss curve is that of a plain PyTorch loop and of upstream's own model, whatever ranks, ZeRO and accumulation."""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.config import CorpusConfig
from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.data import Loader
from pretrain.first_model import torch_seed
from scgpt.config import load_config
from scgpt.model.build import build_model
from scgpt.rng import PURPOSE_WEIGHTS
from scgpt.vocab import CLS, PAD
from tests.data_pipeline.atlases import build_here
from tests.pretrain import runs

CELLS = 16
COMMON = (*runs.MODEL, f"batch.global_batch_size={CELLS}", "train.precision=fp32", "data.valid_split=null")
STEPS, WARMUP = 60, 10
COSINE = (*COMMON, f"train.max_steps={STEPS}", f"schedule.warmup_steps={WARMUP}", "optimizer.lr=3e-3")
# (ZeRO stage, accumulation) by ranks: every value of each; SCGPT_FULL=1 runs all twenty-four.
FEW = {1: [(0, 1), (3, 4)], 2: [(1, 4), (2, 1)], 4: [(0, 4), (3, 1)]}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curves") / "demo"
    build_here(load_config(CorpusConfig, "demo", kind="corpus"), out)
    return out


def begin(config: TrainConfig) -> tuple[torch.nn.Module, Loader, int]:
    """The model that the engine begins with, whole global batches, and the id of `<pad>`."""
    corpus = Corpus.open(config)
    torch.manual_seed(torch_seed(config.train.seed, 0, 0, PURPOSE_WEIGHTS))
    loader = Loader(corpus.train, config.collate_config(), cls_id=corpus.vocab[CLS], seed=config.train.seed,
                    global_batch_size=CELLS, micro_batch_size=CELLS, workers=0)
    return build_model(config.model, corpus.vocab), loader, corpus.vocab[PAD]


def padded(loader: Loader, step: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Genes, values, targets and what is padding, (cells, seq)."""
    (packed,) = loader.load(step).micro_batches
    rows = {name: torch.from_numpy(array) for name, array in packed.padded(pad_id, -2).items()}
    padding = rows["expr"].eq(-2)
    padding[:, 0] = False   # `<cls>` has the same value
    return rows["gene"].long(), rows["masked_expr"].float(), rows["expr"].float(), padding


def plain_pytorch(config: TrainConfig) -> list[float]:
    """The losses of a loop without DeepSpeed, packing, ranks or accumulation."""
    model, loader, pad_id = begin(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        genes, values, targets, padding = padded(loader, step, pad_id)
        output = model(genes, values, padding, MVC=True)
        hidden = values.eq(-1)
        loss = sum((output[name][hidden] - targets[hidden]).square().mean() for name in ("mlm_output", "mvc_output"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = (step - WARMUP) / (STEPS - WARMUP)
        optimizer.param_groups[0]["lr"] = 3e-3 * min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * max(0, done)))
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def plain_losses(corpus: Path) -> list[float]:
    losses = plain_pytorch(load_config(TrainConfig, "demo", [f"data.corpus={corpus}", *COSINE], kind="pretrain"))
    assert losses[-1] < 0.9 * losses[0]
    return losses


@pytest.mark.slow
@pytest.mark.timeout(3600 if runs.FULL else 1200)
@pytest.mark.parametrize("ranks", FEW)
def test_every_loss_of_sixty_steps_is_that_of_a_plain_loop_at_any_stage_and_accumulation(corpus, plain_losses, tmp_path,
                                                                                         ranks):
    cases = list(itertools.product(range(4), (1, 4))) if runs.FULL else FEW[ranks]
    words = [("demo", f"data.corpus={corpus}", *COSINE, f"deepspeed.zero_stage={stage}",
              f"batch.micro_batch_size={CELLS // ranks // accumulation}") for stage, accumulation in cases]
    for case, found in zip(cases, runs.gate(tmp_path, *words, ranks=ranks, steps=STEPS), strict=True):
        assert found["losses"] == pytest.approx(plain_losses, rel=1e-4), case


@pytest.mark.slow
def test_a_hundred_losses_are_those_of_the_real_scgpt_package_trained_with_its_loss(corpus, tmp_path):
    """Same first weights, batches, Adam and StepLR; masked task with MVC, no dropout."""
    site = os.environ.get("SCGPT_STOCK")
    if site is None:
        pytest.skip("SCGPT_STOCK is not set: the folder of `pip install --no-deps --target FOLDER scgpt==0.2.4`")
    settings = ("demo", f"data.corpus={corpus}", *COMMON, "train.max_steps=100", "batch.micro_batch_size=4",
                "optimizer.lr=1e-3", "schedule={kind: step, warmup_steps: 0, interval: 10, factor: 0.9}")
    config = load_config(TrainConfig, settings[0], settings[1:], kind="pretrain")
    model, loader, pad_id = begin(config)
    save_file(model.state_dict(), tmp_path / "first.safetensors")
    save_file({f"{name}/{step}": tensor.contiguous() for step in range(100) for name, tensor
               in zip(("gene", "values", "targets", "padding"), padded(loader, step, pad_id), strict=True)},
              tmp_path / "batches.safetensors")
    sizes = config.model
    (tmp_path / "settings.json").write_text(json.dumps(
        {"steps": 100, "lr": 1e-3, "eps": 1e-8, "interval": 10, "factor": 0.9, "model": {
            "ntoken": model.encoder.embedding.num_embeddings, "d_model": sizes.d_model, "nhead": sizes.n_heads,
            "d_hid": sizes.d_hid, "nlayers": sizes.n_layers, "nlayers_cls": sizes.n_layers_cls, "n_cls": 1,
            "vocab": {"<pad>": pad_id}, "dropout": 0.0, "pad_token": "<pad>", "pad_value": -2}}))
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("stock_training.py")), site, str(tmp_path)],
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = json.loads(done.stdout.splitlines()[-1])
    (found,) = runs.gate(tmp_path, settings, ranks=1, steps=100)
    assert expected[-1] < 0.9 * expected[0]
    assert found["losses"] == pytest.approx(expected, rel=1e-4)
