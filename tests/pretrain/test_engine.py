"""The gradient gate: weights after real steps equal a plain loop's, whatever the ranks, accumulation and ZeRO stage."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import TrainConfig
from pretrain.corpus import Corpus
from pretrain.deepspeed_json import deepspeed_json
from pretrain.deepspeed_package import known_keys
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


def test_the_json_leaves_no_zero_key_and_no_number_of_deepspeeds_to_chance(corpus):
    """Every field of DeepSpeed's own ZeRO and precision models is written, but deprecated and switched-off ones."""
    code = """
import json, sys
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
def names(model):
    return [field.alias or name for name, field in model.model_fields.items()
            if not (field.json_schema_extra or {}).get("deprecated")]
print(json.dumps({"zero": names(DeepSpeedZeroConfig), "bf16": names(DeepSpeedBF16Config),
                  "fp16": names(DeepSpeedFP16Config)}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                         env=os.environ | {"DS_ACCELERATOR": "cpu"})
    theirs = json.loads(run.stdout.splitlines()[-1])
    ours = [deepspeed_json(config_of(corpus, f"deepspeed.zero_stage={stage}"), world_size=2, precision="fp32",
                           on_cpu=True) for stage in range(4)]
    written = set().union(*(set(each["zero_optimization"]) for each in ours))
    no_number = {"offload_param", "offload_optimizer", "zenflow", "leaf_module", "log_trace_cache_warnings",
                 "pipeline_loading_checkpoint", "override_module_apply", "enable_sanity_checks",
                 "save_muon_momentum_buffer_in_memory", "zero_quantized_nontrainable_weights",
                 "stage3_model_persistence_threshold", "stage3_module_granularity_threshold",
                 "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential"}
    assert set(theirs["zero"]) - no_number == written
    for precision in ("bf16", "fp16"):
        assert set(theirs[precision]) == set(ours[2][precision])


def test_the_optimizer_and_clipping_are_those_of_the_configuration(corpus):
    config = config_of(corpus, "optimizer.weight_decay=0.25", "optimizer.grad_clip=0.5", "optimizer.betas=[0.8, 0.9]")
    derived = deepspeed_json(config, world_size=2, precision="bf16", on_cpu=False)
    assert derived["optimizer"]["params"]["weight_decay"] == 0.25
    assert derived["optimizer"]["params"]["betas"] == [0.8, 0.9]
    assert derived["gradient_clipping"] == 0.5
    assert derived["bf16"]["enabled"]
    assert not derived["fp16"]["enabled"]
    assert derived["gradient_accumulation_steps"] == 2   # 8 cells / (2 x 2 ranks)


def test_sizes_that_do_not_fit_the_ranks_are_refused_with_one_that_does(corpus):
    with pytest.raises(ConfigError, match=r"global_batch_size 8 is no multiple of .* 2 x 3 ranks.*make it 6"):
        deepspeed_json(config_of(corpus), world_size=3, precision="fp32", on_cpu=True)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")   # of torch itself, when DeepSpeed imports it
def test_overrides_reach_any_key_but_what_a_setting_decides(corpus):
    config = config_of(corpus, "deepspeed.overrides={zero_optimization: {overlap_comm: true}, vocabulary_size: 64}")
    derived = deepspeed_json(config, world_size=1, precision="fp32", on_cpu=True)
    assert derived["zero_optimization"]["overlap_comm"] is True
    assert derived["zero_optimization"]["stage"] == 2
    assert derived["vocabulary_size"] == 64
    for overrides, says in (("train_batch_size: 9", "'train_batch_size'; set batch.global_batch_size instead"),
                            ("zero_optimization: {stage: 3}", "'zero_optimization.stage'; set deepspeed.zero_stage"),
                            ("bf16: {enabled: true}", "'bf16.enabled'; set train.precision instead"),
                            ("fp16: {enabled: true}", "'fp16.enabled'; set train.precision instead"),
                            ("optimizer: {params: {lr: 1}}", "set optimizer.lr instead"),   # the schedule sets it
                            ("scheduler: {type: WarmupLR}", "set schedule.kind instead"),
                            ("optimizer: {type: Muon}", "the optimizer Muon is not offered"),
                            ("gradient_clipping: high", "'gradient_clipping' = 'high': a number is wanted"),
                            ("zero_optimization: {overlap_comm: 1}", "overlap_comm' = 1: true or false is wanted"),
                            ("fp16: null", "'fp16' = None: a mapping is wanted")):
        with pytest.raises(ConfigError) as caught:
            deepspeed_json(config_of(corpus, f"deepspeed.overrides={{{overrides}}}"), world_size=1, precision="fp32",
                           on_cpu=True)
        assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("key", "says"), [
    ("gradient_cliping", "did you mean 'gradient_clipping'? mend or remove it"),
    ("zero_optimisation", "did you mean 'zero_optimization'?"),
    ("moon_phase", "(deepspeed.overrides); mend or remove it")])
def test_a_key_that_deepspeed_would_pass_over_is_refused(corpus, key, says):
    with pytest.raises(ConfigError) as caught:
        deepspeed_json(config_of(corpus, f"deepspeed.overrides={{{key}: 1}}"), world_size=1, precision="fp32",
                       on_cpu=True)
    assert f"has no key '{key}' and would pass over it" in str(caught.value)
    assert says in str(caught.value)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_no_key_of_deepspeeds_documentation_is_refused(corpus):
    """Those of its page on the JSON, the removed ones too: DeepSpeed has a sentence for each."""
    documented = {
        "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comet",
        "comms_logger", "communication_data_type", "compile", "compression_training", "csv_monitor",
        "curriculum_learning", "data_efficiency", "data_types", "dump_state", "elasticity", "flops_profiler", "fp16",
        "gradient_accumulation_steps", "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "nebula",
        "optimizer", "pipeline", "prescale_gradients", "scheduler", "seq_parallel_communication_data_type",
        "sequence_parallel_size", "data_parallel_size", "sparse_attention", "sparse_gradients", "steps_per_print",
        "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
        "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb", "weight_quantization",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization"}
    written = deepspeed_json(config_of(corpus), world_size=1, precision="fp32", on_cpu=True)
    assert known_keys(torch.device("cpu")) >= documented | written.keys()


def test_what_is_offloaded_stands_in_the_json_and_is_updated_by_torchs_adam(corpus):
    config = config_of(corpus, "deepspeed.zero_stage=3", "deepspeed.offload_optimizer=true",
                       "deepspeed.offload_params=true")
    derived = deepspeed_json(config, world_size=2, precision="bf16", on_cpu=False)
    for key in ("offload_optimizer", "offload_param"):
        assert derived["zero_optimization"][key]["device"] == "cpu"
        assert derived["zero_optimization"][key]["pin_memory"]
    assert derived["optimizer"]["params"]["torch_adam"]
    assert not derived["zero_force_ds_cpu_optimizer"]
    without = deepspeed_json(config_of(corpus), world_size=2, precision="bf16", on_cpu=False)
    assert not any(key.startswith("offload") for key in without["zero_optimization"])


@pytest.mark.parametrize(("settings", "says"), [
    (("deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"), "offload_optimizer needs deepspeed.zero_stage 1"),
    (("deepspeed.zero_stage=2", "deepspeed.offload_params=true"), "offload_params needs deepspeed.zero_stage 3")])
def test_only_what_is_spread_can_be_offloaded(corpus, settings, says):
    with pytest.raises(ConfigError, match=says):
        config_of(corpus, *settings)


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
