"""What a batch teaches: model outputs to weighted loss terms, each as (sum, count) so that the step can normalise them.

A step's loss is, for each term, the sum over all its micro-batches and ranks divided by the count over the same: which
rank held which cell has no influence. DeepSpeed averages gradients over ranks and over accumulated forward passes;
`scaled` undoes both.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import ObjectiveConfig
from pretrain.data import BatchTensors
from scgpt.loss import relative_error_sum, squared_error_sum

EXPRESSION, MVC, MRE = "loss_expression", "loss_mvc", "mre"
WEIGHTS = {EXPRESSION: 1.0, MVC: 1.0}   # of the terms in the loss, as upstream's


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over the hidden positions of one micro-batch."""

    terms: dict[str, Tensor]   # name -> () float32, with gradient
    mre: Tensor                # () float32: relative errors, no gradient

    def scaled(self, *, count: int, copies: int) -> Tensor:
        """This micro-batch's part of the step's loss, () float32, times what DeepSpeed will divide by.

        Args:
            count: hidden positions of the global batch.
            copies: ranks x accumulation.
        """
        weighted_sums = [WEIGHTS[name] * value for name, value in self.terms.items()]
        return torch.stack(weighted_sums).sum() * (copies / max(1, count))

    def detached(self) -> Tensor:
        """(len(names),) float64 in the order of `metric_names`."""
        return torch.stack([*self.terms.values(), self.mre]).detach().double()


def term_names(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The loss terms of a configuration."""
    return (EXPRESSION, MVC) if objective.mvc else (EXPRESSION,)


def metric_names(objective: ObjectiveConfig) -> tuple[str, ...]:
    """The loss terms, then the mean relative error: what `LossSums.detached` holds."""
    return (*term_names(objective), MRE)


def weighted(means: dict[str, float]) -> float:
    """The loss of a step from the means of its terms."""
    return sum(WEIGHTS[name] * value for name, value in means.items() if name in WEIGHTS)


def loss_sums(model: Callable[..., dict[str, Tensor]], batch: BatchTensors, objective: ObjectiveConfig) -> LossSums:
    """Masked expression prediction, and with `mvc` the same from the cell embedding, at the hidden positions only.

    Upstream: squared error of the bins at masked positions, MVC with weight 1. A batch that hides nothing gives 0, with
    a graph: every rank runs the same modules.
    """
    output = model(batch.inputs, MVC=objective.mvc, positions=batch.positions)
    targets = batch.targets[batch.positions]
    predicted = output["mlm_output"].float()
    terms = {EXPRESSION: squared_error_sum(predicted, targets)[0]}
    if objective.mvc:
        terms[MVC] = squared_error_sum(output["mvc_output"].float(), targets)[0]
    with torch.no_grad():
        mre = relative_error_sum(predicted.detach(), targets)[0]
    return LossSums(terms, mre)
