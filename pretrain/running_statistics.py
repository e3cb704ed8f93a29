"""Running mean and variance of batch norms, the same on every rank and on any number of ranks.

A forward pass in training moves them by r <- (1 - m) r + m s, where s is of its micro-batch alone. So a rank lets each
micro-batch begin at r = 0, which leaves what it adds, and how often it moved them; when all micro-batches of a step are
done, their moves are made one after the other in the order of the global batch, as a single rank would make them.
"""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pretrain.world import World


class RunningStatistics:
    """Those of a model, which every rank holds whole, in any ZeRO stage. Without batch norms it costs nothing.

    Args:
        model: its batch norms have a fixed momentum.
        world: the ranks that share a global batch.
        n_micro: micro-batches of a global batch, over all ranks.
    """

    def __init__(self, model: torch.nn.Module, world: World, n_micro: int) -> None:
        self._norms = [module for module in model.modules()
                       if isinstance(module, _BatchNorm) and module.running_mean is not None]
        self._world, self._n_micro = world, n_micro
        self._before: tuple[Tensor, Tensor] | None = None   # of the step that is under way
        self._added: dict[int, tuple[Tensor, Tensor]] = {}  # micro-batch -> (moves, what it added)

    @contextmanager
    def of_micro_batch(self, number: int) -> Iterator[None]:
        """Within it the model runs forward; `number`: of the micro-batch within the global batch."""
        if not self._norms:
            yield
            return
        if self._before is None:
            self._before = self._read()
        self._write(*(torch.zeros_like(part) for part in self._before))
        yield
        self._added[number] = self._read()

    def finish_step(self, *, applied: bool) -> None:
        """After the last micro-batch: make the moves of all ranks, or none where the step is skipped. All call it."""
        if self._before is None:
            return
        if applied:
            self._write(*self._moved(*self._before))
        else:
            self._write(*self._before)
        self._before, self._added = None, {}

    def _moved(self, moves: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """What a micro-batch adds is worn down by the moves of those after it, what was there before by all."""
        table = torch.zeros(self._n_micro, len(self._norms), dtype=torch.float64)   # micro-batch, norm: moves
        for number, (own, _) in self._added.items():
            table[number] = own
        table = self._world.sum(table)
        from_each_on = table.flip(0).cumsum(0).flip(0)
        added = torch.zeros_like(statistics)
        for number, (_, values) in self._added.items():
            added += values * self._kept_after(from_each_on[number] - table[number])
        kept = statistics * self._kept_after(from_each_on[0])
        return moves + table.sum(0), kept + self._world.sum(added)

    def _kept_after(self, moves: Tensor) -> Tensor:
        """(norms,) moves -> what they leave of each statistic, a share."""
        momenta = torch.tensor([float(norm.momentum or 0.0) for norm in self._norms], dtype=torch.float64)
        n_statistics = torch.tensor([2 * norm.num_features for norm in self._norms])
        return ((1.0 - momenta) ** moves).repeat_interleave(n_statistics).to(self._world.device)

    def _read(self) -> tuple[Tensor, Tensor]:
        """(norms,) moves on the CPU and, norm by norm, (features,) means and variances in one row; float64 copies."""
        moves = torch.stack([_of(norm)[0].double() for norm in self._norms]).cpu()
        return moves, torch.cat([part.double() for norm in self._norms for part in _of(norm)[1:]])

    @torch.no_grad()
    def _write(self, moves: Tensor, statistics: Tensor) -> None:
        parts = iter(torch.split(statistics, [norm.num_features for norm in self._norms for _ in range(2)]))
        for norm, moved in zip(self._norms, moves, strict=True):
            count, mean, variance = _of(norm)
            count.copy_(moved)
            mean.copy_(next(parts))
            variance.copy_(next(parts))


def _of(norm: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """The count, mean and variance that a norm keeps."""
    count, mean, variance = norm.num_batches_tracked, norm.running_mean, norm.running_var
    if count is None or mean is None or variance is None:
        raise TypeError("a batch norm that tracks its statistics has lost them")
    return count, mean, variance
