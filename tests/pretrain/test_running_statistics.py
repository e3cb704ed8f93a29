"""Running statistics of batch norms against torch's own, which one process moves from micro-batch to micro-batch."""
import copy
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from pretrain.running_statistics import RunningStatistics
from scgpt.model.dsbn import DomainSpecificBatchNorm1d


@dataclass
class Together:
    """The ranks of a world in one process: `sum` is told beforehand what all of them add up."""

    others: list[Tensor] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)
    device: str = "cpu"

    def sum(self, numbers: Tensor) -> Tensor:
        self.asked.append(numbers)
        return numbers + self.others[len(self.asked) - 1] if self.others else numbers.clone()


class Model(nn.Module):
    """A norm of all cells, and one for each of three domains, of another size and momentum."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.dsbn = nn.BatchNorm1d(3), DomainSpecificBatchNorm1d(2, 3, momentum=0.3)

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.bn(x).sum() + self.dsbn(x[:, :2], domain).sum()


def micro_batches(n: int) -> list[tuple[Tensor, int]]:
    draw = torch.Generator().manual_seed(n)
    return [(torch.randn(5, 3, generator=draw) * (j + 1) + j, (j * j) % 3) for j in range(n)]


def step(model: Model, world: Together, batches: list[tuple[Tensor, int]], numbers: range, *,
         applied: bool = True) -> None:
    statistics = RunningStatistics(model, world, len(batches))
    for j in numbers:
        with statistics.of_micro_batch(j):
            for _ in range(1 + j % 2):   # some run forward twice
                model(*batches[j])
    statistics.finish_step(applied=applied)


def plain(model: Model, batches: list[tuple[Tensor, int]]) -> Model:
    model = copy.deepcopy(model)
    for j, batch in enumerate(batches):
        for _ in range(1 + j % 2):
            model(*batch)
    return model


def assert_alike(model: Model, other: Model) -> None:
    for (name, ours), theirs in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize(("ranks", "n"), [*product((1, 2, 4), (4, 8)), (3, 3)])
def test_ranks_move_them_as_one_process_would(ranks, n):
    """Two steps; what the ranks add up is found by a first round in which each hears nothing of the others."""
    models, expected = [Model() for _ in range(ranks)], Model()
    for number in range(2):
        batches = micro_batches(n + number)[:n]
        expected = plain(expected, batches)
        told: list[list[Tensor]] = [[] for _ in range(ranks)]
        for _ in range(2):   # the moves must be known before what was added is worn down by them
            worlds = [Together([sum((told[other][i] for other in range(ranks) if other != rank),
                                    torch.zeros_like(told[rank][i])) for i in range(len(told[rank]))])
                      for rank in range(ranks)]
            tried = [copy.deepcopy(model) for model in models]
            for rank, (model, world) in enumerate(zip(tried, worlds, strict=True)):
                step(model, world, batches, range(rank, n, ranks))
            told = [world.asked for world in worlds]
        worlds = [Together([sum((told[other][i] for other in range(ranks) if other != rank),
                                torch.zeros_like(told[rank][i])) for i in range(2)]) for rank in range(ranks)]
        for rank, (model, world) in enumerate(zip(models, worlds, strict=True)):
            step(model, world, batches, range(rank, n, ranks))
            assert_alike(model, expected)


def test_a_skipped_step_leaves_no_trace():
    model = plain(Model(), micro_batches(3))
    before = copy.deepcopy(model)
    step(model, Together(), micro_batches(4), range(4), applied=False)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.buffers(), before.buffers(), strict=True))


def test_a_model_without_batch_norms_asks_no_rank():
    world = Together()
    statistics = RunningStatistics(nn.Linear(2, 2), world, 2)
    with statistics.of_micro_batch(0):
        pass
    statistics.finish_step(applied=True)
    assert not world.asked
