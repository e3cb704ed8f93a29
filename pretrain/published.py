"""A published scGPT folder (args.json, vocab.json, best_model.pt) to a release of ours, and so to a starting point.

Only tensors are read. What old folders leave out is found in the tensors: which decoders there are, how many classes
and batches. Names lose `module.` and become those of flash layers, rows of the embedding that no token has are cut off,
special tokens that the vocabulary lacks get the ids that upstream's scripts would append. Then the model that args.json
describes must take every tensor, and the release is recorded, checksummed and verified as any other.
"""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.checkpoint import SUMS
from pretrain.export import ARGS, CARD, CONFIG, check_new, seal
from pretrain.release import FORMAT, FORMAT_VERSION
from pretrain.run_directory import VOCAB
from pretrain.starting_point import EMBEDDING
from scgpt.collate import CollateConfig
from scgpt.errors import CheckpointError, ConfigError
from scgpt.files import json_bytes, publish, remove_abandoned, sha256, write_bytes
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig, read_args
from scgpt.model.weights import load_state, read_state, weights_file, write_release_tensors
from scgpt.vocab import SPECIAL_TOKENS, GeneVocab

_UNUSED = ("cls_decoder.",)   # published generative models carry one that they were not trained with


def import_published(folder: Path, out: Path) -> dict[str, Any]:
    """Make the release `out` of a published folder; what is in it.

    Raises ConfigError where `out` exists or the folder is a release already, CheckpointError with a list of the tensors
    that do not fit, or where a file cannot be read.
    """
    check_new(out)
    if (folder / SUMS).is_file():
        raise ConfigError("this is a release already", where=str(folder), fix="give it to model.init_from as it is")
    args, weights = read_args(folder), weights_file(folder)
    state, vocab = read_state(weights), GeneVocab.from_file(folder / VOCAB, default_token=None)
    added = [token for token in SPECIAL_TOKENS if token not in vocab]
    for token in added:
        vocab.append_token(token)
    cut = _cut_padding(state, vocab, where=str(weights))
    _check_sizes(state, args, where=str(weights))
    config = ModelConfig.from_args(found_in(state) | {key: value for key, value in args.items() if value is not None})
    load_state(build_model(config, vocab, device="meta"), state, where=str(weights), ignore=_UNUSED)
    facts = {"format": FORMAT, "format_version": FORMAT_VERSION, "name": config.name,
             "parameters": config.count_parameters(len(vocab)), "tokens": len(vocab),
             "tokens_added": added, "rows_cut": cut,
             "imported": {path.name: sha256(path) for path in (folder / "args.json", folder / VOCAB, weights)}}
    remove_abandoned(out)
    with publish(out) as building:
        building.mkdir()
        write_release_tensors(building, {name: tensor.shape for name, tensor in state.items()}, state.__getitem__)
        write_bytes(building / ARGS, json_bytes({**args, **config.to_args()}))
        write_bytes(building / CONFIG, json_bytes(facts))
        write_bytes(building / CARD, _card(facts).encode())
        seal(building, vocab, config, CollateConfig.from_args(args))
    return facts


def _cut_padding(state: dict[str, Tensor], vocab: GeneVocab, *, where: str) -> int:
    """Rows of the embedding beyond the vocabulary, which some trainings add to reach a round number: cut off."""
    if EMBEDDING not in state or state[EMBEDDING].dim() != 2:
        raise CheckpointError(f"'{EMBEDDING}' is not among the tensors", where=where,
                              fix="give the folder of a published scGPT model")
    n_rows = len(state[EMBEDDING])
    if n_rows < len(vocab):
        raise CheckpointError(f"the vocabulary has {len(vocab)} tokens, the embedding {n_rows} rows", where=where,
                              fix="take vocab.json and the weights from the same model")
    state[EMBEDDING] = state[EMBEDDING][:len(vocab)]
    return n_rows - len(vocab)


def _check_sizes(state: Mapping[str, Tensor], args: Mapping[str, Any], *, where: str) -> None:
    """Hold args.json against the tensors: a size that is another one there is told, not each tensor that lacks it."""
    widths = state.get("transformer_encoder.layers.0.linear1.weight", ())
    sizes = {"nlayers": len({name.split(".")[2] for name in state if name.startswith("transformer_encoder.layers.")}),
             "embsize": state[EMBEDDING].shape[1], "d_hid": len(widths)}
    others = [f"{key} is {args[key]} there and {size} in the weights" for key, size in sizes.items()
              if size and args.get(key, size) != size]
    if others:
        raise CheckpointError(f"args.json does not describe the weights: {', '.join(others)}", where=where,
                              fix="take args.json and the weights from the same model")


def found_in(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the tensors say of a model, in the words of args.json: its parts, classes and batches."""
    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in state)

    found: dict[str, Any] = {
        "MVC": has("mvc_decoder."), "do_dab": has("grad_reverse_discriminator."),
        "use_batch_labels": has("batch_encoder."), "explicit_zero_prob": has("decoder.zero_logit."),
        "USE_GENERATIVE_TRAINING": has("flag_encoder."),
        "kind": "generator" if has("pert_encoder.") else "transformer",
        "domain_spec_batchnorm": "dsbn" if has("dsbn.") else "batchnorm" if has("bn.") else False}
    sizes = {"n_cls": "cls_decoder.out_layer.weight", "num_batch_labels": "batch_encoder.embedding.weight"}
    found |= {key: len(state[name]) for key, name in sizes.items() if name in state}
    n_norms = len({name.split(".")[2] for name in state if name.startswith("dsbn.bns.")})
    n_domains = n_norms or len(state.get("grad_reverse_discriminator.out_layer.weight", ()))
    return {"num_batch_labels": n_domains, **found} if n_domains else found


def _card(facts: Mapping[str, Any]) -> str:
    files = "\n".join(f"| `{name}` | {value} |" for name, value in facts["imported"].items())
    return f"""# {facts["name"]}, imported

A published model of the scGPT family, {facts["parameters"]:,} parameters and {facts["tokens"]:,} tokens, with checksums
and recorded outputs. Made of:

| file | sha256 |
|---|---|
{files}

`scgpt verify` checks this folder, `scgpt embed` embeds with it, and `model.init_from` begins a training with it.
"""
