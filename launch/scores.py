"""What a demo is judged by: its losses beside the gene means, its embedding beside random weights and PCA."""
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from launch.embed import OBSM_KEY, SOURCE_NAME, embed_blocks, make_embedder
from launch.pictures import draw_embeddings, draw_loss
from pretrain.neighbours import NEIGHBOURS, knn_accuracy, principal_components
from scgpt.vocab import GeneVocab


def score_and_draw(path: Callable[[str], Path], held_out: Path, *, seed: int, resumed_at: Sequence[int],
                   rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of a demo, and its two pictures.

    Args:
        path: name -> where the demo keeps it.
        held_out: the h5ad file that `cells-embedded.h5ad` is the embedding of.
        seed: of the random weights and of t-SNE.
        resumed_at: steps from which the run was continued.
        rows: of metrics.jsonl.
    """
    import anndata

    train, valid = curve(rows, "train"), curve(rows, "valid")
    gene_mean = float(next(row["loss_gene_mean"] for row in reversed(rows) if "loss_gene_mean" in row))
    draw_loss(path("loss.png"), train=train, valid=valid, gene_mean=gene_mean, resumed_at=resumed_at)
    cells = anndata.read_h5ad(path("cells-embedded.h5ad"))
    types = cells.obs["cell_type"].to_numpy().astype(str)
    embeddings = {"trained": np.asarray(cells.obsm[OBSM_KEY]),
                  "random": embed_untrained(path("release"), held_out, seed), "pca": principal_components(cells.X)}
    accuracy = {name: knn_accuracy(points, types) for name, points in embeddings.items()}
    titles = {"trained": "trained", "random": "the same model, random weights", "pca": "PCA"}
    draw_embeddings(path("embedding.png"),
                    {f"{titles[name]}: {NEIGHBOURS}-NN accuracy {accuracy[name]:.3f}": points
                     for name, points in embeddings.items() if name != "pca"}, types, seed=seed)
    return {"train_first": train[0][1], "train_last": float(np.mean([loss for _, loss in train[-10:]])),
            "valid": valid[-1][1], "gene_mean": gene_mean, "cells": len(types), "knn_accuracy": accuracy}


def curve(rows: Sequence[Mapping[str, Any]], split: str) -> list[tuple[int, float]]:
    """(step, loss of masked expression); of a step that a resume repeated, the last row counts."""
    return sorted({row["step"]: row["loss_expression"] for row in rows
                   if row["split"] == split and "loss_expression" in row}.items())


def embed_untrained(release: Path, source_path: Path, seed: int) -> NDArray[np.float32]:
    """What the release's model would make of the cells had it never been trained, (cells, d_model)."""
    import torch

    from data_pipeline.genes import map_source
    from data_pipeline.sources import open_source
    from scgpt.collate import CollateConfig
    from scgpt.model.build import build_model
    from scgpt.model.config import ModelConfig, read_args

    args = read_args(release)
    vocab = GeneVocab.from_file(release / "vocab.json", default_token=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(ModelConfig.from_args(args), vocab)
    embedder = make_embedder(model, vocab, CollateConfig.from_args(args), "cpu")
    with open_source(source_path, name=SOURCE_NAME) as source:
        return np.concatenate([block for _, block in embed_blocks(embedder, source, map_source(source, vocab), seed=0)])
