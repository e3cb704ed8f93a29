"""How well nearby cells share a class: the score of an embedding, and of plain PCA on the same cells."""
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

NEIGHBOURS = 15


def knn_accuracy(points: NDArray[np.floating], labels: NDArray[np.str_] | NDArray[np.int32], *,
                 neighbours: int = NEIGHBOURS) -> float:
    """Share of cells whose label wins the vote of their nearest other cells (Euclidean; a tie goes to the first label).

    Args:
        points: (cells, dimensions) coordinates; on rows of length 1 the neighbours are those by cosine.
        labels: (cells,) the known types, by name or number.
        neighbours: cells that vote.
    """
    types, codes = np.unique(labels, return_inverse=True)
    points = np.asarray(points, np.float64)
    squares = (points ** 2).sum(1)
    distances = squares[:, None] + squares[None, :] - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    nearest = np.argpartition(distances, neighbours, axis=1)[:, :neighbours]
    votes = np.zeros((len(codes), len(types)), np.int64)
    np.add.at(votes, (np.arange(len(codes))[:, None], codes[nearest]), 1)
    return float((votes.argmax(1) == codes).mean())


def principal_components(counts: sparse.csr_matrix, *, components: int = 50) -> NDArray[np.float64]:
    """PCA as single-cell tools do it by default: counts to 10,000 a cell, log(1 + x), centred; (cells, components).

    From the eigenvectors of the cells x cells matrix of inner products: for few cells of many genes, much less work
    than a singular value decomposition of the values.
    """
    totals = np.maximum(np.asarray(counts.sum(1), np.float64).ravel(), 1)
    values = (sparse.diags(1e4 / totals) @ counts).log1p()
    products = np.asarray((values @ values.T).todense(), np.float64)   # the genes stay sparse
    means = products.mean(0)
    products += means.mean() - means - means[:, None]                  # as if the genes had been centred
    squared, rotated = np.linalg.eigh(products)   # ascending
    scale = np.sqrt(np.maximum(squared[::-1], 0))
    found: NDArray[np.float64] = rotated[:, ::-1][:, :components] * scale[:components]
    return found
