"""The two pictures of a demo: how the loss fell, and where the held-out cells lie."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from scgpt.files import publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Sequence[tuple[int, float]]   # (step, loss)


def draw_loss(path: Path, *, train: Curve, valid: Curve, gene_mean: float, resumed_at: Sequence[int]) -> None:
    """Training and validation loss of masked expression over the steps, beside the loss of predicting each gene's mean.

    Args:
        path: the PNG file.
        train, valid: (step, mean squared error of masked bins).
        gene_mean: the validation loss of predicting each gene's mean bin.
        resumed_at: steps from which the run was continued.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")   # without pyplot: no window, no global state
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="#9db4d3", linewidth=0.8, label="training, a batch")
    axes.plot(*zip(*valid, strict=True), color="#1f4e9c", marker="o", markersize=4, label="validation")
    axes.axhline(gene_mean, color="#b2542d", linestyle="--", linewidth=1.2, label="predicting each gene's mean")
    for index, step in enumerate(resumed_at):
        axes.axvline(step, color="#777777", linestyle=":", label="continued after kill -9" if index == 0 else None)
    lowest = min(gene_mean, *(loss for _, loss in [*train, *valid]))
    axes.set_ylim(lowest * 0.97, max(gene_mean, lowest) * 1.2)   # the first steps, far above, would flatten the rest
    axes.set_xlabel("step")
    axes.set_ylabel("masked expression, mean squared error of bins")
    axes.legend(frameon=False)
    _save(figure, path)


def draw_embeddings(path: Path, panels: Mapping[str, NDArray[np.floating]], labels: NDArray[np.str_], *,
                    seed: int = 0) -> None:
    """One panel an embedding: t-SNE of its cells (each (cells, dimensions)), coloured by cell type, largest first."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    types, sizes = np.unique(labels, return_counts=True)
    types = types[np.argsort(-sizes, kind="stable")]
    colors = colormaps["tab20"](np.arange(len(types)) % 20)
    figure = Figure(figsize=(5 * len(panels) + 1.6, 4.8), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)
    for axes, (title, points) in zip(all_axes[0], panels.items(), strict=True):
        plane = tsne(points, seed=seed)
        for cell_type, color in zip(types, colors, strict=True):
            chosen = labels == cell_type
            axes.scatter(*plane[chosen].T, s=9, color=color, linewidths=0, label=f"{cell_type} ({chosen.sum()})")
        axes.set(title=title, xticks=[], yticks=[])
    all_axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, markerscale=2, fontsize=8)
    _save(figure, path)


def tsne(points: NDArray[np.floating], *, seed: int) -> NDArray[np.float64]:
    """A plane in which neighbours stay neighbours (van der Maaten and Hinton, 2008); the same for the same seed."""
    from sklearn.manifold import TSNE

    return np.asarray(TSNE(init="pca", perplexity=30, random_state=seed).fit_transform(np.asarray(points, np.float64)))


def _save(figure: "Figure", path: Path) -> None:
    with publish(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
