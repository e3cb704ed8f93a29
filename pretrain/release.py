"""What a release says besides its tensors: args.json as upstream's readers know it, config.json, the model card.

Nothing here names a path of the machine that trained.
"""
from typing import Any

from pretrain.checkpoint import RunState
from pretrain.config import TrainConfig
from pretrain.objectives import Objective
from scgpt.model.config import ModelConfig
from scgpt.model.weights import Naming
from scgpt.vocab import PAD

FORMAT, FORMAT_VERSION = "scgpt-release", 1


def args_json(config: TrainConfig, state: RunState, naming: Naming) -> dict[str, Any]:
    """A training's command line as upstream's script would have written it, and the model's own keys."""
    objective, batch = config.objective, config.batch
    epochs = state.cells_seen / state.corpus["splits"]["train"]["cells"]
    valid = state.corpus["splits"].get(config.data.valid_split or "", {"cells": 0})["cells"]
    return {
        "data_source": f"corpus {state.corpus['sha256']}", "save_dir": "", "load_model": None, "n_hvg": None,
        "valid_size_or_ratio": valid, "grad_accu_steps": batch.accumulation(state.world_size), "pad_token": PAD,
        "input_style": objective.input_style, "input_emb_style": config.model.input_emb_style,
        "n_bins": objective.n_bins, "max_seq_len": objective.context_length, "training_tasks": objective.task,
        "mask_ratio": objective.mask_ratio, "trunc_by_sample": True, "vocab_path": "vocab.json", "local_rank": 0,
        "batch_size": batch.micro_batch_size, "eval_batch_size": batch.micro_batch_size, "epochs": round(epochs, 3),
        "lr": config.optimizer.lr, "scheduler_interval": config.schedule.interval,
        "scheduler_factor": config.schedule.factor,
        "warmup_ratio_or_step": config.schedule.warmup_steps, "no_cls": not objective.weights.cls,
        "no_cce": not objective.weights.cce,
        "fp16": state.precision == "fp16", "fast_transformer": config.model.layers != "torch" and naming == "flash",
        "log_interval": config.train.log_every, "save_interval": config.train.save_every,
        "mask_value": config.collate_config().mask_value, "pad_value": config.model.pad_value,
        "USE_CLS": bool(objective.weights.cls), "USE_CCE": bool(objective.weights.cce),
        "world_size": state.world_size, **config.model.to_args(),
    }


def config_json(config: TrainConfig, state: RunState, n_parameters: int) -> dict[str, Any]:
    """Everything that decided the weights, and what they score."""
    settings = config.model_dump(mode="json")
    settings["data"].pop("corpus")
    settings["model"].pop("init_from")
    return {"format": FORMAT, "format_version": FORMAT_VERSION, "name": config.model.name, "parameters": n_parameters,
            "step": state.step, "cells_seen": state.cells_seen, "tokens_seen": state.tokens_seen,
            "validation": validation(state), "world_size": state.world_size, "precision": state.precision,
            "corpus": state.corpus, "lineage": state.lineage, "training": settings, "versions": state.versions}


def validation(state: RunState) -> dict[str, float] | None:
    """The newest validation's numbers, with the loss of predicting each gene's mean; None for a run without any."""
    if state.last_valid is None or state.gene_mean_loss is None:
        return None
    return {**state.last_valid, "loss_gene_mean": state.gene_mean_loss}


def model_card(config: TrainConfig, state: RunState, n_parameters: int, vocab_size: int, dtype: str) -> str:
    """README.md of a release."""
    model = config.model
    return f"""# {model.name}

A single-cell foundation model of the scGPT family: {n_parameters:,} parameters, {model.n_layers} layers, d_model \
{model.d_model}, {model.n_heads} heads, context {config.objective.context_length} tokens, {vocab_size:,} tokens in the \
vocabulary. Weights after {state.step:,} optimizer steps.

| file | is |
|---|---|
| `model.safetensors`, `best_model.pt` | the same {dtype} tensors, twice |
| `args.json`, `vocab.json` | what scGPT's own readers need |
| `config.json` | every setting, the corpus, the scores, the versions |
| `recorded.safetensors` | inputs, and what the model computed for them |
| `SHA256SUMS` | of every file; `scgpt verify` checks them and computes the recorded outputs again |

{_lineage(state)}{_data(state)}

{_training(config, state)}

{_scores(state)}

## Loading it in stock scGPT

```python
{_loading(model)}
```

Every tensor of that model is found here, and nothing here is left over{_LEFT_OVER if model.generative else ""}.
"""


_LEFT_OVER = " but `flag_encoder`, which marks genes to generate (its class decoder is untrained)"


_LOADING = """import json, torch
from scgpt.model import {name}
from scgpt.tokenizer import GeneVocab
from scgpt.utils import load_pretrained

args, vocab = json.load(open("args.json")), GeneVocab.from_file("vocab.json")
model = {name}(
    ntoken=len(vocab), d_model=args["embsize"], nhead=args["nheads"], d_hid=args["d_hid"], nlayers=args["nlayers"],
    nlayers_cls=args["n_layers_cls"], n_cls={n_cls}, vocab=vocab, dropout=args["dropout"], pad_token=args["pad_token"],
    pad_value=args["pad_value"], {options})
load_pretrained(model, torch.load("best_model.pt", map_location="cpu"), verbose=False)"""


def _loading(model: ModelConfig) -> str:
    """The code that builds this model in stock scGPT and loads it; options that are stock's defaults are not named."""
    generator = model.kind == "generator"
    options: dict[str, tuple[object, object]] = {   # option -> its value, stock's default
        "n_input_bins": (model.n_input_bins, None), "cell_emb_style": (model.cell_emb_style, "cls"),
        "mvc_decoder_style": (model.mvc_decoder_style, "inner product"),
        "explicit_zero_prob": (model.explicit_zero_prob, False)}
    if generator:
        options |= {"decoder_activation": (model.decoder_activation, None),
                    "decoder_adaptive_bias": (model.decoder_adaptive_bias, False)}
    else:
        options |= {"do_dab": (model.dab, False), "use_batch_labels": (model.use_batch_labels, False),
                    "num_batch_labels": (model.n_batch_labels, None),
                    "domain_spec_batchnorm": (model.domain_spec_batchnorm, False),
                    "input_emb_style": (model.input_emb_style, "continuous")}
    always = {"do_mvc": model.mvc, "use_fast_transformer": False, "pre_norm": model.pre_norm}
    named = always | {name: value for name, (value, default) in options.items() if value != default}
    return _LOADING.format(name="TransformerGenerator" if generator else "TransformerModel", n_cls=model.n_cls,
                           options=", ".join(f"{name}={value!r}" for name, value in named.items()))


def _lineage(state: RunState) -> str:
    begin = state.lineage
    if begin is None:
        return ""
    steps = "" if begin["step"] is None else f", after {begin['step']:,} steps"
    return (f"## Beginning\n\nNot from drawn weights: {begin['text']}. The {begin['kind']} has the checksums "
            f"`{begin['sha256']}`{steps}.\n\n")


def _data(state: RunState) -> str:
    corpus = state.corpus
    splits = [f"| {name} | {split['cells']:,} | {split['tokens']:,} |" for name, split in corpus["splits"].items()]
    sources = [f"| {source['name']} | {source['cells_in']:,} | {source['cells_written']:,} |"
               for source in corpus["sources"]]
    mixture = [f"| {part['sha256'][:16]} | {part['weight']:g} | {part['cells']:,} |"
               for part in corpus.get("mixture", [])]
    if mixture:
        mixture = ["", "| corpus of the mixture | weight | train cells |", "|---|---|---|", *mixture]
    facts = (f"Token dataset with manifest sha256 `{corpus['sha256']}`, vocabulary `{corpus['vocab']}` (sha256 "
             f"`{corpus['vocab_sha256']}`), {corpus['expression_kind']}.")
    return "\n".join(["## Data", "", facts, "", "| split | cells | gene values |", "|---|---|---|", *splits, "",
                      "| source | cells in | cells kept |", "|---|---|---|", *sources, *mixture])


def _training(config: TrainConfig, state: RunState) -> str:
    objective, optimizer, batch = config.objective, config.optimizer, config.batch
    rows = {
        "task": f"{objective.task}{' + MVC' if objective.mvc else ''}, mask ratio {objective.mask_ratio}",
        "loss": ", ".join(f"{term} x {weight:g}" for term, weight in Objective.of(config).weights.items()),
        "values": f"{objective.input_style}, {objective.n_bins} bins, ties: {objective.tie_rule}",
        "batch": f"{batch.global_batch_size} cells a step; {state.cells_seen:,} cells, {state.tokens_seen:,} tokens",
        "optimizer": f"{optimizer.name}, lr {optimizer.lr}, weight decay {optimizer.weight_decay}, "
                     f"clip {optimizer.grad_clip}",
        "schedule": f"{config.schedule.kind}, {config.schedule.warmup_steps} warmup steps",
        "dropout": f"{config.model.dropout}, attention {config.model.attention_dropout}",
        "ranks": f"{state.world_size}, ZeRO {state.zero_stage}, {state.precision}, seed {config.train.seed}",
        "versions": ", ".join(f"{name} {version}" for name, version in state.versions.items())}
    return "\n".join(["## Training", "", "| setting | value |", "|---|---|",
                      *(f"| {key} | {value} |" for key, value in rows.items())])


def _scores(state: RunState) -> str:
    scores = validation(state)
    if scores is None:
        return "## Scores\n\nNo cells were held out."
    rows = {"this model": "loss_expression", "this model, from the cell embedding (MVC)": "loss_mvc",
            "each gene's mean in the train split": "loss_gene_mean"}
    lines = [f"| {name} | {scores[key]:.3f} |" for name, key in rows.items() if key in scores]
    heading = f"Held-out cells after step {scores['step']}: mean squared error of the bins of hidden genes."
    return "\n".join(["## Scores", "", heading, "", "| prediction | loss |", "|---|---|", *lines])
