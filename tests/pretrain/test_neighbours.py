import numpy as np
import pytest
from scipy import sparse

from pretrain.neighbours import knn_accuracy, principal_components


def slow_accuracy(points: np.ndarray, labels: np.ndarray, neighbours: int) -> float:
    """The definition, cell by cell."""
    right = 0
    for i in range(len(points)):
        others = sorted((j for j in range(len(points)) if j != i), key=lambda j: np.linalg.norm(points[i] - points[j]))
        votes = [labels[j] for j in others[:neighbours]]
        winner = max(sorted(set(labels)), key=votes.count)
        right += winner == labels[i]
    return right / len(points)


@pytest.mark.parametrize("neighbours", [1, 4, 15])
def test_accuracy_agrees_with_its_definition(neighbours: int):
    random = np.random.default_rng(0)
    labels = random.choice(["a", "b", "c"], 60)
    points = random.normal(size=(60, 5)) + (labels == "a")[:, None]
    assert knn_accuracy(points, labels, neighbours=neighbours) == slow_accuracy(points, labels, neighbours)


def test_a_cell_does_not_vote_for_itself():
    points = np.array([[0.0], [0.1], [10.0], [10.1]])
    assert knn_accuracy(points, np.array(["a", "b", "a", "b"]), neighbours=1) == 0


def test_components_span_what_a_singular_value_decomposition_finds():
    counts = sparse.csr_matrix(np.random.default_rng(1).poisson(0.5, (30, 80)))
    values = np.log1p(counts.toarray() / counts.toarray().sum(1, keepdims=True) * 1e4)
    values -= values.mean(0)
    rotated, scale, _ = np.linalg.svd(values, full_matrices=False)
    expected = (rotated * scale)[:, :10]
    found = principal_components(counts, components=10)
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)


def test_a_cell_without_counts_has_finite_components():
    counts = sparse.csr_matrix(np.vstack([np.zeros(5), np.eye(5)]))
    assert np.isfinite(principal_components(counts, components=3)).all()


def test_components_are_those_of_the_centred_matrix():
    """Up to sign, as a singular value decomposition of all values gives them."""
    counts = sparse.random(12, 40, density=0.3, format="csr", random_state=0, data_rvs=lambda n: np.arange(1.0, n + 1))
    values = np.log1p(counts.toarray() * (1e4 / counts.sum(1).A1)[:, None])
    left, scale, _ = np.linalg.svd(values - values.mean(0), full_matrices=False)
    found = principal_components(counts, components=4)
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :4] * scale[:4]), rtol=1e-6, atol=1e-6)
