"""What a batch teaches: model outputs to weighted loss terms, each as (sum, count) so that the step can normalise them.

A step's loss is, for each term, the sum over all its micro-batches and ranks divided by the count of what it sums over
(its unit) on the same: which rank held which cell has no influence. DeepSpeed averages gradients over ranks and over
accumulated forward passes; `scaled` undoes both.

Masked training ("pcpt") predicts values hidden in place. Generative training ("gen") predicts the values of a cell's
generation part from its perception part; "both" does so once more, after `cell_prompt_after` steps, with the cell's own
embedding of the first pass in the place of `<cls>` (no gradient flows through it): upstream's recipe.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pretrain.contrast import contrast_sum
from scgpt.loss import bernoulli_nll_sum, cross_entropy_sum, relative_error_sum, squared_error_sum

if TYPE_CHECKING:
    from pretrain.config import TrainConfig
    from pretrain.data import BatchTensors
    from scgpt.collate import PackedBatch
    from scgpt.model.packed import PackedTensors

EXPRESSION, MVC, ZERO, MVC_ZERO = "loss_expression", "loss_mvc", "loss_zero", "loss_mvc_zero"
PROMPTED, CLS, DAB, ECS, CCE = "loss_prompted", "loss_cls", "loss_dab", "loss_ecs", "loss_cce"
MRE = "mre"
# What a term is summed over.
TARGETS, PROMPTED_TARGETS, CELLS, LABELLED = "targets", "prompted_targets", "cells", "labelled_cells"
CONTRASTED, MICRO_BATCHES = "contrasted_cells", "micro_batches"
_UNITS = {EXPRESSION: TARGETS, MVC: TARGETS, ZERO: TARGETS, MVC_ZERO: TARGETS, PROMPTED: PROMPTED_TARGETS,
          CLS: LABELLED, DAB: CELLS, ECS: MICRO_BATCHES, CCE: CONTRASTED, MRE: TARGETS}

Model = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Objective:
    """The loss terms of a run, and how the model is called for them."""

    weights: dict[str, float]       # term -> its weight in the loss, in the order of the metrics
    cell_prompt_after: int = 0      # optimizer steps before the first one with a prompted pass
    labels_for_model: bool = False  # the model itself sees batch labels
    flags_for_model: bool = False   # TransformerGenerator: every gene has perturbation flag 0

    @classmethod
    def of(cls, config: "TrainConfig") -> "Objective":
        """What a configuration asks for."""
        objective, model = config.objective, config.model
        weights, mvc = objective.weights, objective.mvc
        asked = {EXPRESSION: 1.0, MVC: weights.mvc if mvc else 0.0,
                 ZERO: weights.zero_prob if model.explicit_zero_prob else 0.0,
                 MVC_ZERO: weights.mvc * weights.zero_prob if mvc and model.explicit_zero_prob else 0.0,
                 PROMPTED: weights.prompted if objective.task == "both" else 0.0,
                 CLS: weights.cls, DAB: weights.dab if model.dab else 0.0, ECS: weights.ecs, CCE: weights.cce}
        return cls({term: weight for term, weight in asked.items() if weight}, objective.cell_prompt_after,
                   model.use_batch_labels or model.domain_spec_batchnorm is not False, model.kind == "generator")

    @property
    def names(self) -> tuple[str, ...]:
        """The loss terms, then the mean relative error: what `LossSums.detached` holds."""
        return (*self.weights, MRE)

    @property
    def units(self) -> tuple[str, ...]:
        """What the terms are summed over, each unit once; targets first."""
        return tuple(dict.fromkeys((TARGETS, *(_UNITS[term] for term in self.weights))))

    def counts(self, batches: Sequence["PackedBatch"], *, step: int | None) -> list[int]:
        """How much of each of `units` some micro-batches hold; `step`: optimizer steps before, None in evaluation."""
        found = {TARGETS: sum(batch.n_targets for batch in batches), CELLS: sum(len(batch) for batch in batches),
                 MICRO_BATCHES: len(batches),
                 LABELLED: sum(int(np.count_nonzero(batch.class_labels >= 0)) for batch in batches
                               if batch.class_labels is not None)}
        found[PROMPTED_TARGETS] = found[TARGETS] if self.prompts(step) else 0
        found[CONTRASTED] = 0 if step is None else found[CELLS]
        return [found[unit] for unit in self.units]

    def prompts(self, step: int | None) -> bool:
        """Whether the step after `step` steps has a prompted pass."""
        return PROMPTED in self.weights and step is not None and step >= self.cell_prompt_after

    def means(self, sums: Sequence[float], counts: Sequence[float]) -> dict[str, float]:
        """`loss` and the mean of each of `names` from sums in their order and counts in the order of `units`.

        A term that nothing was summed over is left out, but for those over targets, which are 0 then.
        """
        by_unit = dict(zip(self.units, counts, strict=True))
        means = {name: float(total / max(1.0, by_unit[_UNITS[name]])) for name, total
                 in zip(self.names, sums, strict=True) if by_unit[_UNITS[name]] or _UNITS[name] == TARGETS}
        return {"loss": self.weighted(means), **means}

    def weighted(self, means: Mapping[str, float]) -> float:
        """The loss from the means of its terms."""
        return sum(self.weights[name] * value for name, value in means.items() if name in self.weights)

    def sums(self, model: Model, batch: "BatchTensors", *, step: int | None) -> "LossSums":
        """Run the model on a micro-batch and add up its errors.

        A batch that hides nothing gives 0, with a graph: every rank runs the same modules.

        Args:
            model: TransformerModel or TransformerGenerator, or an engine around it.
            batch: what it sees and must predict.
            step: optimizer steps before this one; None in evaluation, where no second pass is made.
        """
        inputs = self._inputs(batch)
        output = model(inputs, MVC=MVC in self.weights, CLS=CLS in self.weights, ECS=ECS in self.weights,
                       positions=batch.positions)
        targets = batch.targets[batch.positions]
        terms = self._expression_terms(output, targets)
        if PROMPTED in self.weights and self.prompts(step):
            prompted = model(inputs, positions=batch.positions, input_cell_emb=output["cell_emb"].detach())
            terms[PROMPTED] = squared_error_sum(prompted["mlm_output"].float(), targets)[0]
        terms |= self._cell_terms(output, batch)
        if CCE in self.weights and step is not None:
            nowhere = batch.positions[:0]   # the second view is of cells: nothing is decoded
            second = model(inputs, positions=nowhere)["cell_emb"]
            terms[CCE] = contrast_sum(output["cell_emb"].float(), second.float())
        with torch.no_grad():
            mre = relative_error_sum(output["mlm_output"].detach().float(), targets)[0]
        return LossSums(self, terms, mre)

    def embed(self, model: Model, batch: "BatchTensors") -> Tensor:
        """Cell embeddings (cells, d_model) of a micro-batch that hides nothing."""
        return model(self._inputs(batch), positions=batch.positions)["cell_emb"]

    def _inputs(self, batch: "BatchTensors") -> "PackedTensors":
        inputs = batch.inputs
        if self.labels_for_model:
            inputs = replace(inputs, batch_labels=batch.batch_labels)
        if self.flags_for_model:
            inputs = replace(inputs, pert_flags=torch.zeros_like(inputs.gene_ids))
        return inputs

    def _expression_terms(self, output: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
        """Squared errors of the bins, and of whether there is a value at all, at the chosen positions."""
        terms = {}
        for term, name in ((EXPRESSION, "mlm_output"), (MVC, "mvc_output")):
            if term in self.weights:
                terms[term] = squared_error_sum(output[name].float(), targets)[0]
        for term, name in ((ZERO, "mlm_zero_probs"), (MVC_ZERO, "mvc_zero_probs")):
            if term in self.weights:
                terms[term] = bernoulli_nll_sum(output[name].float(), targets)[0]
        return terms

    def _cell_terms(self, output: dict[str, Tensor], batch: "BatchTensors") -> dict[str, Tensor]:
        """Class, domain and similarity of cells."""
        terms = {}
        for term, name, labels in ((CLS, "cls_output", batch.class_labels), (DAB, "dab_output", batch.batch_labels)):
            if term in self.weights and labels is not None:
                known = torch.where(labels < 0, -100, labels)   # -100: not counted
                terms[term] = cross_entropy_sum(output[name].float(), known)[0]
        if ECS in self.weights:
            terms[ECS] = output["loss_ecs"].float()
        return terms


@dataclass(frozen=True, slots=True)
class LossSums:
    """Sums over one micro-batch."""

    objective: Objective
    terms: dict[str, Tensor]   # name -> () float32, with gradient; those that this step has
    mre: Tensor                # () float32: relative errors, no gradient

    def scaled(self, *, counts: Sequence[int], copies: int) -> Tensor:
        """This micro-batch's part of the step's loss, () float32, times what DeepSpeed will divide by.

        Where a sum is not finite, so is no gradient: who looks at the gradient alone, on whatever rank, learns of it.

        Args:
            counts: of the global batch, in the order of `Objective.units`.
            copies: ranks x accumulation.
        """
        parts = []
        for unit, count in zip(self.objective.units, counts, strict=True):
            sums = [self.objective.weights[name] * value for name, value in self.terms.items() if _UNITS[name] == unit]
            if sums:
                parts.append(torch.stack(sums).sum() * (copies / max(1, count)))
        is_finite = torch.stack([*self.terms.values(), self.mre]).detach().isfinite().all()
        return torch.stack(parts).sum() * torch.where(is_finite, 1.0, torch.nan)

    def detached(self) -> Tensor:
        """(len(names),) float64 in the order of `Objective.names`; 0 for a term that this step does not have."""
        values = [self.terms.get(name, torch.zeros_like(self.mre)) for name in self.objective.weights]
        return torch.stack([*values, self.mre]).detach().double()
