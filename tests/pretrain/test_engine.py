"""The gradient gate: weights after real steps equal a plain loop's, whatever the ranks, accumulation and ZeRO stage."""
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.first_model import switch, torch_seed
from pretrain.precision import resolve_precision
from scgpt.config import load_config, shipped_configs
from scgpt.errors import ConfigError
from scgpt.model.build import build_model
from tests.pretrain import runs
from tests.pretrain.reference import first_weights, plain_loop

STEPS = 3
# A large eps keeps Adam from turning rounding noise of vanishing gradients into whole steps.
GATE = (f"train.max_steps={STEPS}", "schedule.warmup_steps=2", "optimizer.lr=0.02", "optimizer.eps=1e-2",
        "optimizer.weight_decay=0.1", "optimizer.grad_clip=5.0", "data.valid_split=null")


def config_of(corpus: Path, *settings: str) -> TrainConfig:
    return load_config(TrainConfig, "demo", [f"data.corpus={corpus}", *runs.SETTINGS, *settings], kind="pretrain")


# (ZeRO stage, accumulation, precision): every value of each by one and by two ranks; SCGPT_FULL=1 runs all sixteen.
FEW = {1: [(0, 4, "fp32"), (0, 1, "bf16"), (1, 1, "fp32"), (2, 4, "bf16"), (3, 1, "bf16")],
       2: [(0, 4, "bf16"), (1, 4, "bf16"), (2, 1, "fp32"), (2, 4, "fp32"), (3, 4, "fp32"), (3, 1, "bf16")]}
FEW_GENERATIVE = {1: [(0, 1, "fp32"), (2, 4, "bf16")], 2: [(1, 1, "bf16"), (2, 4, "bf16"), (3, 4, "fp32")]}
GENERATIVE = ("model.generative=true", "objective.task=both", "objective.mask_ratio=[0.25, 0.5, 0.75]",
              "objective.cell_prompt_after=1")   # two forward passes from the second step on
# Contrast is with the cells that are computed at the same time: the whole batch without accumulation. Float32 alone:
# bfloat16's own rounding is 4 to 9 % of these gradients, on one rank without contrast too.
FEW_OTHER_TERMS = {1: [(1, 1, "fp32")], 2: [(0, 1, "fp32"), (2, 1, "fp32"), (3, 1, "fp32")]}
OTHER_TERMS = ("data.class_column=donor", "model.n_cls=3", "objective.weights.cls=50", "data.batch_column=source",
               "model.n_batch_labels=2", "model.dab=true", "objective.weights.dab=50", "model.use_batch_labels=true",
               "model.explicit_zero_prob=true", "objective.weights.zero_prob=50", "objective.weights.cce=500")
FEW_RECOMPUTED = {1: [(0, 4, "fp32")], 2: [(2, 4, "fp32"), (3, 1, "fp32")]}
ALL = list(itertools.product(range(4), (1, 4), ("fp32", "bf16")))
# Of what the whole gradient, or the whole way of the weights, measures; per tensor of its own size and a hundredth of
# the whole. A micro-batch that is lost or counted twice shows as 0.2 or more.
TOLERANCE = {"fp32": 1e-5, "bf16": 0.03, "fp16": 0.01}
# bfloat16 itself rounds weights in each step: the reference computes with weights rounded at the start only.


def relative_errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor],
                    start: dict[str, torch.Tensor] | None = None) -> tuple[float, dict[str, float]]:
    """Error of all tensors together relative to how far they are from `start` (0 where None), and of each alone."""
    way = {name: tensor - (0 if start is None else start[name]) for name, tensor in expected.items()}
    whole = torch.cat([tensor.flatten() for tensor in way.values()]).norm()
    errors = {name: (found[name].detach().double() - expected[name]).norm() for name in expected}
    alone = {name: float(errors[name] / (way[name].norm() + 0.01 * whole)) for name in expected}
    return float(torch.stack(list(errors.values())).norm() / whole), alone


def run_gate(corpus: Path, folder: Path, ranks: int, cases: list[tuple[int, int, str]],
             *settings: str) -> list[dict[str, Any]]:
    """What the real engine finds in each case, in one group of ranks."""
    common = ("demo", f"data.corpus={corpus}", *runs.SETTINGS, *GATE, *settings)
    return runs.gate(folder, *((*common, f"batch.micro_batch_size={8 // ranks // accumulation}",
                                f"deepspeed.zero_stage={stage}", f"train.precision={precision}")
                               for stage, accumulation, precision in cases), ranks=ranks, steps=STEPS)


def check_gate(found: dict[str, Any], expected: dict[str, dict[str, torch.Tensor]], tolerance: float,
               case: object) -> None:
    """Weights on their way from the start, and the last gradient, are those of the reference: together and each."""
    start = {name: expected["first"][name] for name in expected["weights"]}
    assert found["weights"].keys() == found["gradients"].keys() == expected["gradients"].keys()
    for kind, begin in (("gradients", None), ("weights", start)):
        whole, alone = relative_errors(found[kind], expected[kind], begin)
        assert whole < tolerance, (case, kind, whole)
        worst = max(alone, key=alone.__getitem__)
        assert alone[worst] < 3 * tolerance, (case, kind, worst, alone[worst])


@pytest.mark.slow
@pytest.mark.timeout(3600 if runs.FULL else 1200)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("settings", "few"), [
    ((), FEW), (GENERATIVE, FEW_GENERATIVE), (OTHER_TERMS, FEW_OTHER_TERMS),
    ((*GENERATIVE, "train.recompute=true"), FEW_RECOMPUTED)], ids=["masked", "generative", "other-terms", "recomputed"])
def test_weights_and_gradients_after_real_steps_are_those_of_a_plain_loop_in_float64(corpus, tmp_path, ranks, settings,
                                                                                     few):
    full = [case for case in ALL if settings != OTHER_TERMS or case[1:] == (1, "fp32")]
    cases = full if runs.FULL else few[ranks]
    reference = {precision: plain_loop(config_of(corpus, *GATE, *settings), STEPS, rounded=precision == "bf16")
                 for precision in ("fp32", "bf16")}
    for case, found in zip(cases, run_gate(corpus, tmp_path, ranks, cases, *settings), strict=True):
        check_gate(found, reference[case[2]], TOLERANCE[case[2]], case)


# DeepSpeed has no float16 on a CPU ("not supported on your device"): gate.py lifts that refusal, and the loss scaling
# and the arithmetic are what a GPU runs. A small first scale, so that no step overflows, that doubles after each; no
# clipping, which would hide a wrong scale.
FLOAT16 = ("deepspeed.overrides={fp16: {initial_scale_power: 4, loss_scale_window: 1}}", "optimizer.grad_clip=1e9")


@pytest.mark.slow
def test_float16_passes_the_gate_while_its_loss_scale_grows(corpus, tmp_path):
    cases = [(0, 4, "fp16"), (1, 1, "fp16"), (2, 4, "fp16"), (3, 1, "fp16")]
    expected = plain_loop(config_of(corpus, *GATE, *FLOAT16), STEPS)
    for case, found in zip(cases, run_gate(corpus, tmp_path, 1, cases, *FLOAT16), strict=True):
        check_gate(found, expected, TOLERANCE["fp16"], case)
        assert found["loss_scale"] > 16
        assert found["grad_norm"] == pytest.approx(norm_of(expected["gradients"]), rel=0.01), case


def norm_of(tensors: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors.values()]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_offloaded_optimizers_and_parameters_pass_the_gate(corpus, tmp_path, ranks):
    common = ("demo", f"data.corpus={corpus}", *runs.SETTINGS, *GATE, f"batch.micro_batch_size={4 // ranks}",
              "train.precision=fp32", "deepspeed.offload_optimizer=true")
    cases = [(*common, f"deepspeed.zero_stage={stage}") for stage in (1, 2, 3)]
    cases.append((*cases[-1], "deepspeed.offload_params=true"))
    expected = plain_loop(config_of(corpus, *GATE), STEPS)
    for case, found in zip(cases, runs.gate(tmp_path, *cases, ranks=ranks, steps=STEPS), strict=True):
        check_gate(found, expected, TOLERANCE["fp32"], case[-2:])


@pytest.mark.slow
def test_compiled_layers_pass_the_gate_and_no_batch_compiles_anew(corpus, tmp_path):
    """Every batch has another number of tokens. Compiled layers are recomputed backward, too."""
    common = ("demo", f"data.corpus={corpus}", *runs.SETTINGS, *GATE, "train.precision=fp32", "train.compile=true")
    cases = [(*common, "deepspeed.zero_stage=2"), (*common, "deepspeed.zero_stage=2", "train.recompute=true"),
             (*common, "deepspeed.zero_stage=3")]
    expected = plain_loop(config_of(corpus, *GATE), STEPS)
    for case, found in zip(cases, runs.gate(tmp_path, *cases, ranks=1, steps=STEPS), strict=True):
        check_gate(found, expected, TOLERANCE["fp32"], case[-2:])
        assert found["graphs"][0] > 0, case[-2:]
        assert found["graphs"][0] == found["graphs"][-1], case[-2:]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_first_weights_are_the_same_bits_in_every_stage_on_any_ranks(corpus, tmp_path, ranks):
    """In ZeRO 3 no rank ever holds the whole model."""
    kinds = [(stage, precision, words) for stage, precision, words in (
        (0, "fp32", ()), (2, "fp32", ()), (3, "fp32", ()), (3, "bf16", ()), (3, "fp32", ("model.layers=torch",)),
        (3, "fp32", ("deepspeed.offload_optimizer=true", "deepspeed.offload_params=true")),
        (3, "fp32", ("model.layers=linear",)), (3, "fp32", GENERATIVE), (3, "bf16", OTHER_TERMS),
        (3, "fp32", ("model.n_layers=5", "train.recompute=true")))]
    cases = [(f"deepspeed.zero_stage={stage}", f"train.precision={precision}", *words)
             for stage, precision, words in kinds]
    common = ("demo", f"data.corpus={corpus}", *runs.SETTINGS)
    for case, kind, found in zip(cases, kinds, runs.gate(tmp_path, *((*common, *case) for case in cases), ranks=ranks,
                                                         steps=0), strict=True):
        expected = dict(first_weights(config_of(corpus, *case), rounded=kind[1] == "bf16").named_parameters())
        assert found["weights"].keys() == expected.keys(), case
        assert all(torch.equal(found["weights"][name].double(), tensor) for name, tensor in expected.items()), case


@pytest.mark.slow
def test_a_rank_of_zero_3_builds_its_share_of_a_model_and_not_the_model(corpus, tmp_path):
    """Memory that drawing the first weights takes on each of four ranks: a quarter of the model, two layers of eight.

    The matrices have more than 32 MiB each, which the allocator gives back at once.
    """
    large = ("model.n_layers=8", "model.d_model=256", "model.d_hid=34000", "train.max_steps=1")
    words = (f"data.corpus={corpus}", *runs.SETTINGS, *large, "deepspeed.zero_stage=3")
    code, errors = runs.program(Path(__file__).with_name("first_model_memory.py"), str(tmp_path), *words, ranks=4)
    assert code == 0, errors
    for rank in range(4):
        grown, whole = json.loads((tmp_path / f"{rank}.json").read_text())
        assert whole > 500e6
        assert grown < 0.6 * whole


TINY = (*runs.MODEL, "batch.global_batch_size=4", "batch.micro_batch_size=2", "schedule.warmup_steps=1")


@pytest.mark.slow
def test_a_tiny_model_trains_with_each_shipped_recipe(corpus, tmp_path):
    recipes = list(shipped_configs("pretrain"))
    cases = [(recipe, f"data.corpus={corpus}", *TINY) for recipe in recipes]
    for recipe, found in zip(recipes, runs.gate(tmp_path, *cases, ranks=1, steps=3), strict=True):
        assert np.isfinite(found["losses"]).all(), recipe
        assert all(bool(tensor.isfinite().all()) for tensor in found["weights"].values()), recipe
        assert sum(bool(tensor.any()) for tensor in found["gradients"].values()) > 30, recipe


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "micro", "stage", "precision"), [
    (1, 4, 0, "fp32"), (1, 4, 0, "bf16"), (2, 2, 2, "fp32"), (2, 2, 3, "fp32")])
def test_the_weights_in_a_checkpoint_are_those_of_a_plain_loop(corpus, tmp_path, ranks, micro, stage, precision):
    settings = (*GATE, f"batch.micro_batch_size={micro}", f"deepspeed.zero_stage={stage}",
                f"train.precision={precision}")
    code, errors = runs.train(corpus, tmp_path / "run", *settings, ranks=ranks)
    assert code == 0, errors
    expected, found = plain_loop(config_of(corpus, *settings), STEPS, rounded=precision == "bf16"), runs.weights(
        tmp_path / "run")
    assert found.keys() == expected["weights"].keys()
    whole, _ = relative_errors(found, expected["weights"], expected["first"])
    assert whole < TOLERANCE[precision]


def model_switched(corpus: Path, *settings: str) -> torch.nn.Module:
    config = config_of(corpus, *settings)
    model = build_model(config.model, Corpus.open(config).vocab, device="meta")
    switch(model, config.train)
    return model


@pytest.mark.parametrize("layers", ["flash", "torch"])
def test_determinism_reaches_every_attention_and_torch_and_is_off_unless_asked_for(corpus, monkeypatch, layers):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # set where it is not, for cuBLAS
    try:
        model = model_switched(corpus, "train.deterministic=true", f"model.layers={layers}")
        assert torch.are_deterministic_algorithms_enabled()
        assert all(layer.self_attn.deterministic for layer in model.transformer_encoder.layers)
        assert not any(layer.self_attn.deterministic for layer in model_switched(corpus).transformer_encoder.layers)
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiling_without_a_compiler_is_refused(corpus, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and there is no 'no-such-compiler'"):
        model_switched(corpus, "train.compile=true")


def test_a_cpu_trains_in_float32_unless_told():
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_dropout_seeds_differ_by_run_step_and_micro_batch():
    seeds = {torch_seed(seed, step, number, np.uint64(9))
             for seed in range(4) for step in range(50) for number in range(8)}
    assert len(seeds) == 4 * 50 * 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "says"), [
    ("deepspeed.overrides={zero_optimization: {nonsense: 9}}", "nonsense"), ("train.precision=fp16", "fp16")])
def test_what_deepspeed_refuses_is_one_sentence(corpus, tmp_path, setting, says):
    if says == "fp16" and torch.cuda.is_available():
        pytest.skip("a GPU trains in fp16")
    code, errors = runs.train(corpus, tmp_path / "run", *GATE, setting)
    assert code == 2
    assert "DeepSpeed refuses the configuration" in errors
    assert says in errors
    assert "Traceback" not in errors


@pytest.mark.slow
def test_bf16_trains_on_a_cpu_that_is_told_to(corpus, tmp_path):
    code, errors = runs.train(corpus, tmp_path / "run", "train.max_steps=30", "train.precision=bf16")
    assert code == 0, errors
    losses = [row["loss"] for (split, _), row in runs.curve(tmp_path / "run").items() if split == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert all(tensor.dtype == torch.float32 for tensor in runs.weights(tmp_path / "run").values())
