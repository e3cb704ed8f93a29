"""The training loop: fetch a global batch, learn from it, tell, validate, save, stop where something asks for it."""
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from pretrain import checkpoint
from pretrain.checkpoint import RunState
from pretrain.config import RunConfig, TrainConfig
from pretrain.continuation import other_settings, other_terms
from pretrain.corpus import Corpus
from pretrain.data import GlobalStep, Loader
from pretrain.engine import Engine
from pretrain.estimate import Flops, device_peak_tflops
from pretrain.evaluation import HeldOut
from pretrain.metrics import Window
from pretrain.prefetch import Prefetch
from pretrain.probe import Probe
from pretrain.recovery import Fault, Interruption, rollback_targets
from pretrain.run_directory import CONFIG, DEEPSPEED, OpenRun, open_run
from pretrain.schedule import learning_rate
from pretrain.starting_point import begin_from
from pretrain.stopwatch import TO_DEVICE
from pretrain.tracing import TRACES, traced
from pretrain.world import RankError, World, is_lost_peer, join_world, words_of_transport
from scgpt.counted import counted
from scgpt.errors import EXIT_DONE, EXIT_INTERRUPTED, CheckpointError
from scgpt.files import write_bytes, write_json


def train(config: TrainConfig, out: Path, *, profile: bool = False) -> int:
    """Train, or continue training, in run directory `out`; the exit code (0 done, 75 interrupted with a checkpoint).

    With `profile` rank 0 leaves a trace of a few steps there, see `traced`. Every rank calls it with the same
    arguments. Raises ScgptError.
    """
    with ExitStack() as stack:
        corpus = Corpus.open(config)
        interruption = stack.enter_context(Interruption(config.train.max_time_s))
        world = stack.enter_context(join_world(timeout_s=config.deepspeed.timeout_s))
        stack.enter_context(_lost_peers_are_told())
        run = stack.enter_context(open_run(config, out, corpus, world))
        if run.state.step >= run.total_steps or has_stalled(run.state, config.train):
            run.log.event("already_finished", f"the run is finished: {run.state.step} of {run.total_steps} steps are "
                                              "done; a higher limit or train.patience continues it")
            return EXIT_DONE
        return Training(config, corpus, run, world, interruption).run(profile=profile)


@contextmanager
def _lost_peers_are_told() -> Iterator[None]:
    """A collective that fails means that another rank is gone or hung: say that, in place of the transport's words."""
    try:
        yield
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise RankError(f"another rank is gone or hung ({words_of_transport(error)})",
                        fix="see what it said; the same command continues from the last checkpoint") from error


def has_stalled(state: RunState, settings: RunConfig) -> bool:
    """Whether `train.patience` validations in a row have not improved."""
    return settings.patience is not None and state.n_not_improved >= settings.patience


class Training:
    """One start of a run: from its last checkpoint to its end, or to an interruption."""

    def __init__(self, config: TrainConfig, corpus: Corpus, run: OpenRun, world: World,
                 interruption: Interruption) -> None:
        self.config, self.corpus, self.world, self.interruption = config, corpus, world, interruption
        self.state, self.log, self.total_steps, self.checkpoints = run.state, run.log, run.total_steps, run.checkpoints
        self.engine = Engine(config, corpus.vocab, world)
        self.loader = Loader.of_run(config, corpus, rank=world.rank, world_size=world.world_size, device=world.device)
        self.held_out = (HeldOut(corpus.valid, config, corpus.vocab, world, corpus.valid_labels)
                         if corpus.valid is not None else None)
        self.probe = Probe.of(corpus, config, world)
        self.flops = Flops(config.model, self.engine.objective)
        self.window = Window(self.state.window, self.engine.objective, config.train.peak_tflops
                             or device_peak_tflops(world.device, self.engine.precision))
        changed: list[str] = []
        if self.state.step:
            self._tell_of_other_micro_batches(run.before or config)
            changed = checkpoint.load(self.engine, self.checkpoints, self.state, world)
            changed += other_settings(run.before or config, config)
        elif config.model.init_from is not None:
            self.state.lineage = begin_from(config.model.init_from, self.engine, config.model, corpus.vocab, world)
            self.log.event("begin_from", **self.state.lineage)
        if world.is_first:   # from here on the run is continued: no earlier failure has changed a file of it
            write_bytes(run.path / CONFIG, config.to_yaml().encode())
            write_json(run.path / DEEPSPEED, self.engine.json)
        self._begin(changed)

    def _begin(self, changed: list[str]) -> None:
        """Tell; of a new run, measure where it starts from."""
        facts: dict[str, Any] = {"step": self.state.step, "total_steps": self.total_steps,
                                 "world_size": self.world.world_size, "precision": self.engine.precision}
        if self.state.step:
            text = f"continuing from step {self.state.step} of {self.total_steps}"
            self.log.event("resume", "; ".join([text, *changed]), **facts, changed=changed)
            return
        unseen = self.config.data.valid_split if self.held_out is None else None
        self.log.event("start", f"training {counted(self.total_steps, 'step')} on "
                       f"{counted(self.world.world_size, 'rank')}"
                       + (f"; split '{unseen}' has no cell to validate on" if unseen else ""), **facts)
        if self.held_out is not None:
            self.state.gene_mean_loss = self.held_out.gene_mean_loss(self.corpus.train, len(self.corpus.vocab))
            self.log.event("gene_mean", loss_gene_mean=self.state.gene_mean_loss)
            self._validate()
        if self.probe is not None:
            self._look_at_embeddings(self.probe)

    def _tell_of_other_micro_batches(self, before: TrainConfig) -> None:
        """Warn where the curve cannot be the uninterrupted one."""
        ranks, size = (self.state.world_size, self.world.world_size), self.config.batch.micro_batch_size
        terms = other_terms(before, self.config, ranks=ranks)
        if terms:
            text = (f"warning: {', '.join(terms)} will differ from the uninterrupted run's: a micro-batch had "
                    f"{before.batch.micro_batch_size} cells on {counted(ranks[0], 'rank')}, and has {size} on "
                    f"{ranks[1]}")
            self.log.event("micro_batch_changed", text, step=self.state.step, terms=terms,
                           micro_batch_size=[before.batch.micro_batch_size, size], world_size=list(ranks))

    def run(self, *, profile: bool = False) -> int:
        """Train to the end of the run (exit code 0), or until a signal or the time limit (75, after a checkpoint)."""
        settings = self.config.train
        with self.loader.batches(self.state.step) as steps, self._traced(steps, profile=profile) as handed_out:
            for step in handed_out:
                stop = self._learn(step)
                done = self.state.step == self.total_steps
                if (self.state.step % settings.log_every == 0 or done) and not self.window.is_empty:
                    self._tell(steps)
                if self.state.step % settings.eval_every == 0 or done:
                    self._validate()
                if self.probe is not None and (self.state.step % settings.probe_every == 0 or done):
                    self._look_at_embeddings(self.probe)
                if has_stalled(self.state, settings) and not done:
                    done = True
                    self.log.event("stopped_early", f"stopped early: {self.state.n_not_improved} validations in a row "
                                                    "did not improve", step=self.state.step,
                                   best_step=self.state.best_step, best_loss=self.state.best_loss)
                improved = self.state.best_step == self.state.step
                went_back = any(end == self.state.step for _, end in self.state.rollbacks)
                if self.state.step % settings.save_every == 0 or improved or went_back or stop or done:
                    self._save()
                if done:
                    self.log.event("finished", f"finished after {counted(self.state.step, 'step')}",
                                   step=self.state.step)
                    return EXIT_DONE
                if stop:
                    reason = next(reason for reason in self.world.gather(self.interruption.reason) if reason)
                    self.log.event("interrupted", f"interrupted after step {self.state.step} ({reason}); "
                                                  "the same command continues", step=self.state.step, reason=reason)
                    return EXIT_INTERRUPTED
        raise AssertionError("the loader of a training is endless")

    def _traced(self, steps: Iterator[GlobalStep], *, profile: bool) -> AbstractContextManager[Iterator[GlobalStep]]:
        if not (profile and self.world.is_first):
            return nullcontext(steps)
        return closing(traced(steps, self.checkpoints.parent / TRACES, first_step=self.state.step + 1,
                              device=self.world.device, tell=lambda path: self.log.event(
                                  "profiled", f"a trace is in {path}", step=self.state.step)))

    def _learn(self, step: GlobalStep) -> bool:
        """One optimizer step; whether any rank asks to stop after it."""
        asks = self.interruption.reason is not None
        counts = self.engine.objective.counts(step.micro_batches, step=self.state.step)
        flops = self.flops.of_step(step.micro_batches, step=self.state.step)
        *counts, n_tokens, flops, n_asking = self.world.sum(
            torch.tensor([*counts, step.n_tokens, flops, asks])).tolist()
        lr = learning_rate(self.state.step + 1, lr=self.config.optimizer.lr, schedule=self.config.schedule,
                           total_steps=self.total_steps)
        sums = []
        for number, on_host in zip(step.numbers, step.tensors, strict=True):
            with self.engine.stopwatch.part(TO_DEVICE):
                tensors = on_host.to(self.world.device)
            sums.append(self.engine.train(tensors, step=self.state.step, micro_batch=number, counts=counts, lr=lr))
        self.state.step += 1
        self.state.cells_seen += step.n_cells
        self.state.tokens_seen += n_tokens
        if self.engine.applied:
            self.state.skipped_in_row = 0
        elif self._skip(Fault.of(self.engine.objective.names, step.micro_batches, sums, self.world)):
            return bool(n_asking)
        self.window.add(torch.stack(sums).sum(0), counts=counts, n_cells=step.n_cells, n_tokens=n_tokens,
                        flops=flops, lr=lr)
        return bool(n_asking)

    def _skip(self, fault: Fault) -> bool:
        """Tell of a step without an update, go back after too many in a row; False where fp16 only seeks its scale."""
        if not fault.terms and self.engine.searches_scale:
            return False
        self.state.skipped_in_row += 1
        text = f"step {self.state.step} is skipped: {fault} not finite"
        self.log.event("step_skipped", text, step=self.state.step, not_finite=str(fault).split(", "),
                       cell_ids=fault.cell_ids, sources=self.corpus.sources_of(fault.cell_ids))
        if self.state.skipped_in_row > self.config.train.max_skipped_steps:
            self._go_back()
        return True

    def _go_back(self) -> None:
        """Take the weights and the optimizer of an earlier checkpoint; the next step learns from the next global batch.

        Raises CheckpointError where there is none, or after too many times.
        """
        state = self.state
        earlier = self.world.of_first(self._earlier_checkpoint)
        checkpoint.load(self.engine, self.checkpoints, earlier, self.world)
        state.rollbacks.append([earlier.step, state.step])
        state.skipped_in_row = 0
        self.log.event("rolled_back", f"back to the weights of step {earlier.step}; the global batches up to step "
                                      f"{state.step} are skipped", step=state.step, to_step=earlier.step)

    def _earlier_checkpoint(self) -> checkpoint.RunState:
        state, settings = self.state, self.config.train
        what = f"the loss or gradient is not finite in {state.skipped_in_row} steps in a row, up to step {state.step}"
        fix = ("see the cells of `step_skipped` in events.jsonl; start a new run without them, or with a lower "
               "optimizer.lr")
        if len(state.rollbacks) >= settings.max_rollbacks:
            raise CheckpointError(f"{what}, after {len(state.rollbacks)} roll-backs", where=str(self.checkpoints),
                                  fix=f"{fix}, or raise train.max_rollbacks")
        for step in rollback_targets(checkpoint.steps_of(self.checkpoints), save_every=settings.save_every,
                                     last_update=state.step - state.skipped_in_row, rollbacks=state.rollbacks):
            try:
                return checkpoint.validate(self.checkpoints / checkpoint.checkpoint_name(step))
            except CheckpointError as error:
                self.log.event("checkpoint_skipped", f"checkpoint {step} is skipped: {error.what}")
        raise CheckpointError(f"{what}, and there is no earlier checkpoint to go back to", where=str(self.checkpoints),
                              fix=fix)

    def _tell(self, steps: Prefetch[GlobalStep]) -> None:
        """Write the means since the last row."""
        row = self.window.row(self.world, steps.wait_s, self.engine.stopwatch.take())
        epochs = self.corpus.order.epochs(self.state.cells_seen)
        self.log.row({"step": self.state.step, "split": "train", **row, "grad_norm": self.engine.grad_norm,
                      "cells_seen": self.state.cells_seen, "tokens_seen": self.state.tokens_seen,
                      **{f"epochs_{corpus}": number for corpus, number in enumerate(epochs)}})

    def _validate(self) -> None:
        """Measure on the held-out cells; remember the best step."""
        if self.held_out is None:
            return
        started = time.perf_counter()
        means = self.held_out.loss(self.engine)
        self.state.last_valid = {"step": self.state.step,
                                 **{name: mean for name, mean in means.items() if math.isfinite(mean)}}
        best = math.inf if self.state.best_loss is None else self.state.best_loss
        if self.state.step and means["loss_expression"] < best:
            self.state.best_loss, self.state.best_step = means["loss_expression"], self.state.step
        self._note_improvement(means["loss_expression"])
        seconds = time.perf_counter() - started
        self.window.exclude(seconds)
        self.log.row({"step": self.state.step, "split": self.config.data.valid_split, **means,
                      "loss_gene_mean": self.state.gene_mean_loss, "eval_s": seconds})

    def _look_at_embeddings(self, probe: Probe) -> None:
        """Measure how well cells' neighbours share their class."""
        started = time.perf_counter()
        if self.state.probe_pca is None:
            self.state.probe_pca = probe.baseline()
        accuracy = probe.accuracy(self.engine)
        seconds = time.perf_counter() - started
        self.window.exclude(seconds)
        self.log.row({"step": self.state.step, "split": "probe", **probe.facts(), "knn_accuracy": accuracy,
                      "knn_accuracy_pca": self.state.probe_pca, "eval_s": seconds})

    def _note_improvement(self, loss: float) -> None:
        """What `train.patience` counts."""
        state, least = self.state, self.config.train.min_improvement
        best = math.inf if state.patience_loss is None else state.patience_loss
        if loss < best - least:   # never one that is not finite
            state.patience_loss, state.n_not_improved = loss, 0
        else:
            state.n_not_improved += 1

    def _save(self) -> None:
        started = time.perf_counter()
        self.state.window = self.window.reduced(self.world)
        checkpoint.save(self.engine, self.checkpoints, self.state, self.world, keep_last=self.config.train.keep_last)
        seconds = time.perf_counter() - started
        self.window.exclude(seconds)
        self.log.event("checkpoint", step=self.state.step, seconds=round(seconds, 3), best=self.state.best_step)
