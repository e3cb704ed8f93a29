import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.embed import load_embedder
from pretrain import checkpoint
from pretrain.checkpoint import SUMS, sums_bytes
from pretrain.export import export, verify
from pretrain.shards import Shards
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import sha256
from scgpt.model import TransformerModel
from scgpt.model.weights import rename
from scgpt.tokenizer import GeneVocab
from scgpt.utils import load_pretrained
from tests.pretrain import runs

ARGS_OF_UPSTREAM = frozenset((
    "data_source", "save_dir", "load_model", "n_hvg", "valid_size_or_ratio", "grad_accu_steps", "pad_token",
    "input_style", "input_emb_style", "n_bins", "max_seq_len", "training_tasks", "mask_ratio", "trunc_by_sample",
    "vocab_path", "local_rank", "batch_size", "eval_batch_size", "epochs", "lr", "scheduler_interval",
    "scheduler_factor", "warmup_ratio_or_step", "no_cls", "no_cce", "fp16", "fast_transformer", "nlayers", "nheads",
    "embsize", "d_hid", "dropout", "n_layers_cls", "log_interval", "save_interval", "mask_value", "pad_value"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    corpus = runs.make_corpus(folder / "corpus")
    code, errors = runs.train(corpus, folder / "run", "train.max_steps=6", "train.save_every=2", "train.eval_every=6")
    assert code == 0, errors
    return folder / "run"


@pytest.fixture(scope="module")
def release(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("release") / "release")


def stock_model(release: Path, **settings) -> TransformerModel:
    """Built from args.json and vocab.json alone, as stock code does."""
    args, vocab = json.loads((release / "args.json").read_text()), GeneVocab.from_file(release / "vocab.json")
    return TransformerModel(
        ntoken=len(vocab), d_model=args["embsize"], nhead=args["nheads"], d_hid=args["d_hid"], nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"], n_cls=1, vocab=vocab, dropout=args["dropout"], pad_token=args["pad_token"],
        pad_value=args["pad_value"], do_mvc=True, do_dab=False, use_batch_labels=False, domain_spec_batchnorm=False,
        explicit_zero_prob=False, fast_transformer_backend="flash", pre_norm=False, **settings)


def test_a_release_is_whole_and_computes_what_it_recorded(release):
    found = verify(release)
    assert found["files"] == 8 == len(list(release.iterdir()))
    assert found["largest_difference"] == 0.0
    assert found["values_compared"] > 100


def test_the_tensors_are_the_checkpoints_to_the_bit(run, release):
    expected = runs.weights(run, "best")
    for state in (load_file(release / "model.safetensors"), torch.load(release / "best_model.pt", weights_only=True)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_release_of_every_stage_has_the_bits_that_were_in_memory(tmp_path, ranks):
    """Gathered over the ranks by DeepSpeed itself when the checkpoint was written; batch norms' statistics too."""
    corpus = runs.write_two_sources(tmp_path / "corpus")
    kinds = [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")]
    cases = [(f"data.corpus={corpus}", *runs.SETTINGS, "train.max_steps=3", "train.eval_every=3",
              "data.batch_column=source", "model.n_batch_labels=2", "data.one_domain_batches=true",
              "model.domain_spec_batchnorm=dsbn", f"deepspeed.zero_stage={stage}", f"train.precision={precision}",
              "--out", str(tmp_path / f"{stage}-{precision}")) for stage, precision in kinds]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    code, errors = runs.program(Path(__file__).with_name("weights_in_memory.py"), str(tmp_path / "cases.json"),
                                ranks=ranks)
    assert code == 0, errors
    for stage, precision in kinds:
        out = tmp_path / f"{stage}-{precision}"
        expected = torch.load(out / "in_memory.pt")
        release = export(out, tmp_path / f"release-{stage}-{precision}", step="latest")
        for state in (load_file(release / "model.safetensors"),
                      torch.load(release / "best_model.pt", weights_only=True)):
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], tensor) for name, tensor in expected.items()), (stage, precision)


@pytest.mark.parametrize("fast", [True, False])
def test_stock_code_finds_every_key_and_leaves_none_over(release, fast):
    model = stock_model(release, use_fast_transformer=fast)
    state = torch.load(release / "best_model.pt", weights_only=True)
    naming = "flash" if fast else "torch"
    assert {rename(name, naming) for name in state} == set(model.state_dict())
    load_pretrained(model, state, strict=False, prefix=None, verbose=True)
    renamed = {rename(name, naming): tensor for name, tensor in state.items()}
    assert all(torch.equal(tensor, renamed[name]) for name, tensor in model.state_dict().items())


def padded_inputs(release: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The recorded cells as stock code takes them, the recorded outputs, and which positions are tokens."""
    recorded = load_file(release / "recorded.safetensors")
    vocab = json.loads((release / "vocab.json").read_text())
    lengths = recorded["cu_seqlens"].diff()
    is_token = torch.arange(int(lengths.max())) < lengths[:, None]
    gene, values = torch.full(is_token.shape, vocab["<pad>"]), torch.full(is_token.shape, -2.0)
    gene[is_token], values[is_token] = recorded["gene_ids"], recorded["values"]
    return {"gene": gene, "values": values}, recorded, is_token


@pytest.mark.slow
def test_the_real_scgpt_package_loads_a_release_strictly_and_computes_the_same(release, tmp_path):
    site = os.environ.get("SCGPT_STOCK")
    if site is None:
        pytest.skip("SCGPT_STOCK is not set: the folder of `pip install --no-deps --target FOLDER scgpt==0.2.4`")
    inputs, recorded, is_token = padded_inputs(release)
    save_file(inputs, tmp_path / "inputs.safetensors")
    program = Path(__file__).with_name("stock_scgpt.py")
    done = subprocess.run([sys.executable, str(program), site, str(release), str(tmp_path / "inputs.safetensors")],
                          capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {name: torch.tensor(value) for name, value in json.loads(done.stdout.splitlines()[-1]).items()}
    assert torch.allclose(found["cell_emb"], recorded["cell_emb"], atol=1e-5)
    for name in ("mlm_output", "mvc_output"):
        assert torch.allclose(found[name][is_token], recorded[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_generative_run_resumes_to_the_bit_and_its_release_has_all_that_stock_code_looks_for(tmp_path):
    corpus = runs.make_corpus(tmp_path / "corpus")
    settings = ("model.generative=true", "objective.task=both", "objective.cell_prompt_after=3", "model.dropout=0.1",
                "objective.mask_ratio=[0.25, 0.5, 0.75]", "schedule.kind=constant", "train.eval_every=3",
                "train.log_every=1", "train.save_every=5")
    for out, limits in (("whole", (6,)), ("run", (5, 6))):
        for limit in limits:
            code, errors = runs.train(corpus, tmp_path / out, *settings, f"train.max_steps={limit}")
            assert code == 0, errors
    whole, resumed = runs.weights(tmp_path / "whole"), runs.weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    curve = runs.curve(tmp_path / "whole")
    assert "loss_prompted" not in curve["train", 2]
    assert curve["train", 4]["loss_prompted"] > 0
    assert curve["train", 6] == runs.curve(tmp_path / "run")["train", 6]
    assert not any("loss_prompted" in row for (split, _), row in curve.items() if split == "valid")
    release = export(tmp_path / "run", tmp_path / "release")
    assert verify(release)["largest_difference"] == 0.0
    recorded = load_file(release / "recorded.safetensors")
    assert (recorded["perception_lengths"] < recorded["cu_seqlens"].diff()).all()
    model, state = stock_model(release, use_fast_transformer=True), load_file(release / "model.safetensors")
    assert set(state) - set(model.state_dict()) == {"flag_encoder.weight"}
    assert set(model.state_dict()) <= set(state)
    args = json.loads((release / "args.json").read_text())
    assert (args["training_tasks"], args["mask_ratio"]) == ("both", [0.25, 0.5, 0.75])
    assert args["USE_GENERATIVE_TRAINING"] is True
    assert load_embedder(release, "cpu").model.use_generative_training


def test_args_json_has_the_keys_that_upstreams_readers_know(release):
    args = json.loads((release / "args.json").read_text())
    assert set(args) >= ARGS_OF_UPSTREAM
    assert (args["nlayers"], args["embsize"], args["nheads"], args["d_hid"]) == (2, 16, 2, 16)
    assert (args["max_seq_len"], args["mask_value"], args["pad_value"], args["n_bins"]) == (32, -1, -2, 51)


def test_nothing_in_a_release_names_a_path_of_the_machine(release):
    for path in release.iterdir():
        assert str(release.parents[1]).encode() not in path.read_bytes()


def test_the_card_tells_the_corpus_the_scores_and_the_versions(run, release):
    card, state = (release / "README.md").read_text(), runs.state_of(run, "best")
    for fact in (state["corpus"]["sha256"], f"{state['last_valid']['loss_expression']:.3f}",
                 f"{state['gene_mean_loss']:.3f}", f"torch {torch.__version__}", "| train | 60 |", "load_pretrained("):
        assert fact in card


def test_the_code_in_the_card_runs(release):
    code = (release / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=release, capture_output=True, text=True,
                          check=False, env=os.environ | {"PYTHONPATH": str(runs.ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["model.safetensors", "best_model.pt", "args.json", "vocab.json", "config.json",
                                  "README.md", "recorded.safetensors", SUMS])
def test_one_changed_byte_of_any_file_is_found(release, tmp_path, name):
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    content = (copy / name).read_bytes()
    for place in (0, len(content) // 2, len(content) - 1):
        (copy / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(CheckpointError):
            verify(copy)


def test_weights_that_compute_something_else_are_found_although_every_sum_fits(release, tmp_path):
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    state = load_file(copy / "model.safetensors")
    state["decoder.fc.0.bias"] = state["decoder.fc.0.bias"] + 0.1
    save_file(state, copy / "model.safetensors")
    (copy / SUMS).write_bytes(sums_bytes({path.name: sha256(path) for path in copy.iterdir() if path.name != SUMS}))
    with pytest.raises(CheckpointError, match="another mlm_output than was recorded"):
        verify(copy)


def test_the_same_checkpoint_gives_the_same_bytes(run, release, tmp_path):
    again = export(run, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in release.iterdir()}


@pytest.mark.parametrize(("step", "expected"), [("latest", 6), ("best", 6), ("4", 4)])
def test_any_checkpoint_can_be_exported(run, tmp_path, step, expected):
    assert json.loads((export(run, tmp_path / "out", step=step) / "config.json").read_text())["step"] == expected


@pytest.mark.parametrize(("dtype", "naming"), [("bfloat16", "flash"), ("float16", "torch"), ("float32", "torch")])
def test_a_release_has_the_dtype_and_the_names_that_were_asked_for(run, tmp_path, dtype, naming):
    release = export(run, tmp_path / "out", dtype=dtype, naming=naming)
    assert verify(release)["largest_difference"] < 1e-6
    expected = {rename(name, naming): tensor for name, tensor in runs.weights(run, "best").items()}
    for state in (load_file(release / "model.safetensors"), torch.load(release / "best_model.pt", weights_only=True)):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor.to(getattr(torch, dtype))) for name, tensor in expected.items())
    args = json.loads((release / "args.json").read_text())
    assert args["fast_transformer"] == (naming == "flash")
    for fast in {naming == "flash", False}:   # stock code renames flash names for torch's layers, not the other way
        model, wanted = stock_model(release, use_fast_transformer=fast), "flash" if fast else "torch"
        load_pretrained(model, torch.load(release / "best_model.pt", weights_only=True), prefix=None, verbose=False)
        halves = {rename(name, wanted): tensor.to(getattr(torch, dtype)) for name, tensor in expected.items()}
        assert all(torch.equal(tensor, halves[name].float()) for name, tensor in model.state_dict().items())
    assert f"the same {dtype} tensors" in (release / "README.md").read_text()
    assert load_embedder(release, "cpu").model.encoder.embedding.weight.dtype == torch.float32


def test_a_release_of_several_files_is_verified_whole(run, tmp_path):
    release = export(run, tmp_path / "out", max_shard_size=8000)
    files = sorted(path.name for path in release.glob("model-*.safetensors"))
    assert len(files) > 1
    assert verify(release)["files"] == 8 + len(files)
    assert not (release / "model.safetensors").exists()
    assert load_embedder(release, "cpu")
    (release / files[1]).unlink()
    with pytest.raises(CheckpointError, match=f"'{files[1]}' is missing"):
        verify(release)


@pytest.mark.slow
def test_the_memory_of_an_export_is_a_few_tensors_not_the_model(tmp_path):
    """Anonymous memory, sampled while 150 MB of weights become a release: mapped files are the kernel's to drop."""
    corpus = runs.make_corpus(tmp_path / "corpus")
    large = ("train.max_steps=1", "data.valid_split=null", "model.n_layers=60", "model.d_model=256", "model.d_hid=512",
             "model.n_heads=2", "batch.global_batch_size=2", "objective.context_length=8")
    code, errors = runs.train(corpus, tmp_path / "run", *large)
    assert code == 0, errors
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("export_memory.py")), str(tmp_path)],
                          capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(runs.ROOT)})
    grown = int(done.stdout.split()[-1])
    assert (tmp_path / "release" / "model.safetensors").stat().st_size > 120e6
    assert grown < 40e6


def test_an_existing_folder_is_never_written_into(run, release):
    before = sha256(release / SUMS)
    with pytest.raises(ConfigError, match="exists already"):
        export(run, release)
    assert sha256(release / SUMS) == before


def test_a_torn_checkpoint_is_not_exported_and_nothing_is_left(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    victim = next(checkpoint.find(copy, "best").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is not what SHA256SUMS says"):
        export(copy, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_shard_that_would_run_code_is_refused(run, tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    copy = Path(shutil.copytree(checkpoint.find(run, "best"), tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match="not a file of tensors and numbers"):
        torch.save({"module": Bomb(), "param_shapes": []}, next(copy.glob("*model_states.pt")), pickle_module=pickle)
        Shards(copy, stage=2, world_size=1)
    assert not (tmp_path / "exploded").exists()


def test_a_missing_shard_is_named(run, tmp_path):
    copy = Path(shutil.copytree(checkpoint.find(run, "best"), tmp_path / "checkpoint"))
    with pytest.raises(CheckpointError, match=r"0 files .*zero_pp_rank_1_mp_rank_00_optim_states"):
        Shards(copy, stage=2, world_size=2)


def test_what_is_no_release_or_no_run_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="not a release"):
        verify(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export(tmp_path, tmp_path / "out")
