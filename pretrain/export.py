"""A checkpoint of a run to a release, a folder that stock scGPT loads; and the check of a release.

    model.safetensors best_model.pt args.json vocab.json config.json README.md recorded.safetensors SHA256SUMS

Where a largest size of a file is given, `model-00001-of-0000N.safetensors` and their index take the place of the first.
Tensors are put together one by one from the shards, so memory does not grow with the ranks. The folder appears under
its name only when it is whole, and after what is written was read back and has computed its recorded outputs.
"""
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from pretrain import checkpoint
from pretrain.checkpoint import SUMS, RunState, check_sums, sums_bytes
from pretrain.continuation import config_of_run
from pretrain.release import args_json, config_json, model_card
from pretrain.run_directory import VOCAB
from pretrain.shards import Shards
from scgpt.collate import CollateConfig
from scgpt.data.schema import offsets_of
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import json_bytes, publish, remove_abandoned, sha256, write_bytes
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from scgpt.model.decoders import ClsDecoder
from scgpt.model.packed import PackedTensors
from scgpt.model.weights import (
    PT_FILE,
    Naming,
    load_state,
    read_state,
    weights_file,
    write_release_tensors,
)
from scgpt.vocab import CLS, GeneVocab

RECORDED, ARGS, CONFIG, CARD = "recorded.safetensors", "args.json", "config.json", "README.md"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INPUTS = ("gene_ids", "values", "cu_seqlens", "perception_lengths", "batch_labels")   # the last two where asked for
_OUTPUTS = ("mlm_output", "mlm_zero_probs", "mvc_output", "cell_emb")
_RECORDED_CELLS, _RECORDED_TOKENS = 8, 64   # cells of the recorded input, tokens of the longest
_TOLERANCE = 1e-4   # of an output, relative to the largest: other machines add up in another order
_FIX = "take the release from where it was published, or export it again"


def export(run: Path, out: Path, *, step: str = "best", dtype: str = "float32", naming: Naming = "flash",
           max_shard_size: int | None = None) -> Path:
    """Write the release of a run's checkpoint to the folder `out`, which must not exist; its path.

    Args:
        run: run directory.
        out: folder to make, whole or not at all.
        step: `best` (lowest validation loss; the newest where there is no validation), `latest` or a step number.
        dtype: of the tensors, `float32`, `bfloat16` or `float16`.
        naming: of the attention's tensors, as flash layers or as torch's have them.
        max_shard_size: bytes of a safetensors file, see write_release_tensors.

    Raises ConfigError when `out` exists, CheckpointError when the checkpoint is missing, torn or does not fit.
    """
    check_new(out)
    folder = checkpoint.find(run, step)
    state = checkpoint.validate(folder)
    config, _ = config_of_run(state.config, where=str(folder))
    vocab = vocab_of(run, state)
    remove_abandoned(out)
    with publish(out) as building:
        building.mkdir()
        shards = Shards(folder, stage=state.zero_stage, world_size=state.world_size)
        untrained = _untrained(config.model)
        write_release_tensors(
            building, shards.shapes | {name: tensor.shape for name, tensor in untrained.items()},
            lambda name: untrained[name] if name in untrained else shards.read(name),
            naming=naming, dtype=DTYPES[dtype], max_file_bytes=max_shard_size)
        n_parameters = config.model.count_parameters(len(vocab))
        write_bytes(building / ARGS, json_bytes(args_json(config, state, naming)))
        write_bytes(building / CONFIG, json_bytes(config_json(config, state, n_parameters)))
        write_bytes(building / CARD, model_card(config, state, n_parameters, len(vocab), dtype).encode())
        seal(building, vocab, config.model, config.collate_config())
    return out


def check_new(out: Path) -> None:
    """Raises ConfigError where the folder of a release cannot be made."""
    if out.exists():
        raise ConfigError("the folder of the release exists already", where=str(out),
                          fix="give another --out, or remove it")
    if not out.parent.is_dir():
        raise ConfigError("the folder that should hold the release does not exist", where=str(out.parent),
                          fix="make it, or give another --out")


def vocab_of(run: Path, state: RunState) -> GeneVocab:
    """The vocabulary of a run; CheckpointError where its file is not the one that it was trained with."""
    if not (run / VOCAB).is_file():
        raise CheckpointError(f"the run has no {VOCAB}", where=str(run), fix="restore the file from the corpus")
    vocab = GeneVocab.from_file(run / VOCAB, default_token=None)
    if vocab.sha256 != state.corpus["vocab_sha256"]:
        raise CheckpointError("vocab.json is not the vocabulary that the run was trained with", where=str(run / VOCAB),
                              fix="restore the file from the corpus")
    return vocab


def seal(folder: Path, vocab: GeneVocab, model: ModelConfig, collating: CollateConfig) -> None:
    """Complete a release: vocabulary, recorded outputs, checksums; then verify it."""
    write_bytes(folder / VOCAB, vocab.to_bytes())
    inputs = _recorded_inputs(vocab, model, collating)
    write_bytes(folder / RECORDED, save({**inputs, **_outputs(folder, weights_file(folder), inputs)}))
    write_bytes(folder / SUMS, sums_bytes({path.name: sha256(path) for path in folder.iterdir()}))
    verify(folder)


def _untrained(config: ModelConfig) -> dict[str, Tensor]:
    """What stock scGPT looks for and a generative model of one class does not have: a class decoder, freshly drawn."""
    if not config.generative or config.n_cls > 1:
        return {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = ClsDecoder(config.d_model, config.n_cls, nlayers=config.n_layers_cls)
    return {f"cls_decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}


def _recorded_inputs(vocab: GeneVocab, model: ModelConfig, collating: CollateConfig) -> dict[str, Tensor]:
    """Made-up cells: `<cls>`, then genes with bins, some of them hidden. Always the same for a vocabulary."""
    draw = np.random.default_rng(0)
    genes = np.array([index for token, index in vocab.items() if not token.startswith("<")])
    longest = min(_RECORDED_TOKENS, collating.context_length, len(genes) + 1)
    lengths = np.linspace(2, longest, _RECORDED_CELLS).astype(np.int32)
    gene_ids: list[int] = []
    values: list[float] = []
    for length in lengths:
        bins = draw.integers(1, collating.n_bins, length - 1)
        hidden = draw.random(length - 1) < 0.4
        gene_ids += [vocab[CLS], *np.sort(draw.choice(genes, length - 1, replace=False)).tolist()]
        values += [collating.cls_value, *np.where(hidden, collating.mask_value, bins).tolist()]
    inputs = {"gene_ids": torch.tensor(gene_ids), "values": torch.tensor(values, dtype=torch.float32),
              "cu_seqlens": torch.from_numpy(offsets_of(lengths).astype(np.int32))}
    if model.generative:   # half of each cell is generated
        inputs["perception_lengths"] = torch.from_numpy(-(-lengths // 2))
    if model.use_batch_labels or model.domain_spec_batchnorm:
        inputs["batch_labels"] = torch.zeros(len(lengths), dtype=torch.int64)
    return inputs


@torch.no_grad()
def _outputs(folder: Path, weights: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model in a release computes, in evaluation mode on the CPU: the outputs of _OUTPUTS that it has."""
    args = json.loads((folder / ARGS).read_bytes())
    vocab = GeneVocab.from_file(folder / VOCAB, default_token=None)
    config = ModelConfig.from_args(args)
    model = build_model(config, vocab, device="meta")
    load_state(model, read_state(weights), where=str(weights), ignore=("cls_decoder.",))
    model.eval()
    packed = PackedTensors(
        inputs["gene_ids"], inputs["values"], inputs["cu_seqlens"], int(inputs["cu_seqlens"].diff().max()),
        batch_labels=inputs.get("batch_labels"),
        pert_flags=torch.zeros_like(inputs["gene_ids"]) if config.kind == "generator" else None)
    if "perception_lengths" in inputs:
        packed = packed.split(inputs["perception_lengths"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)   # a generator with zero probabilities samples what it predicts
        output = model(packed, MVC=config.mvc)
    return {name: output[name].float().contiguous() for name in _OUTPUTS if name in output}


def verify(release: Path) -> dict[str, float]:
    """Check a release: every file against SHA256SUMS, no other file there, both weight files compute what is recorded.

    Returns the number of `files` and `values_compared`, and the `largest_difference` of an output.

    Raises CheckpointError at the first fault.
    """
    if not (release / SUMS).is_file():
        raise CheckpointError(f"not a release: it has no {SUMS}", where=str(release),
                              fix="give a folder that `scgpt export RUN --out DIR` has made")
    sums = check_sums(release, fix=_FIX)
    missing = {weights_file(release).name, PT_FILE, ARGS, VOCAB, CONFIG, CARD, RECORDED} - set(sums)
    if missing:
        raise CheckpointError(f"the release lacks {', '.join(sorted(missing))}", where=str(release), fix=_FIX)
    recorded = load_file(release / RECORDED)
    inputs = {name: recorded[name] for name in _INPUTS if name in recorded}
    compared, largest = 0, 0.0
    for weights in dict.fromkeys((weights_file(release), release / PT_FILE)):
        for name, output in _outputs(release, weights, inputs).items():
            difference = float((output - recorded[name]).abs().max())
            if not difference <= _TOLERANCE * max(1.0, float(recorded[name].abs().max())):
                raise CheckpointError(f"the model computes another {name} than was recorded (by {difference:.3g})",
                                      where=str(weights), fix=_FIX)
            compared, largest = compared + output.numel(), max(largest, difference)
    return {"files": len(sums) + 1, "values_compared": compared, "largest_difference": largest}
