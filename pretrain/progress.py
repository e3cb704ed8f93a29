"""What a run shows while it goes on: a bar on a terminal, plain lines elsewhere. stderr, rank 0 only.

A run outlives whoever reads it (scgpt/stderr.py). The JSON lines of the run directory have it all.
"""
from collections.abc import Mapping
from datetime import timedelta
from typing import IO, Any, cast

from scgpt.stderr import LastingStderr, say

_FOR_EVER_S = 1e9   # 30 years: such a number of steps means that something else ends the run


def describe(row: Mapping[str, Any], total_steps: int) -> str:
    """A row of metrics.jsonl as a line of a log."""
    step = f"step {row['step']}/{total_steps}  "
    if row["split"] == "train":
        mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
        left_s = (total_steps - row["step"]) * row["step_time_s"]
        left = timedelta(seconds=round(left_s)) if left_s < _FOR_EVER_S else "for ever"
        return (f"{step}loss {row['loss']:.2f}  lr {row['lr']:.2e}  grad {row['grad_norm']:.2f}  "
                f"{row['cells_per_s']:,.0f} cells/s  {row['tokens_per_s']:,.0f} tokens/s{mfu}  {left} left")
    if "knn_accuracy" in row:
        return (f"{step}{row['split']}: {row['neighbours']}-NN accuracy of {row['column']} {row['knn_accuracy']:.3f} "
                f"(PCA: {row['knn_accuracy_pca']:.3f})")
    return (f"{step}{row['split']}: loss_expression {row['loss_expression']:.2f} "
            f"(predicting each gene's mean: {row['loss_gene_mean']:.2f})")


class Lines:
    """One plain line for each row and each event: what a log file takes."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps

    def row(self, row: Mapping[str, Any]) -> None:
        """Tell a row of metrics.jsonl."""
        say(describe(row, self._total))

    def say(self, line: str) -> None:
        """Tell an event."""
        say(line)

    def close(self) -> None:
        """Nothing is left to do."""


class Bar:
    """A bar for the train rows, and lines above it."""

    def __init__(self, total_steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[line]}", markup=False))
        self._total = total_steps
        self._progress = Progress(*columns, console=Console(file=cast(IO[str], LastingStderr())),
                                  redirect_stderr=False)
        self._task = self._progress.add_task("train", total=total_steps, line="")
        self._progress.start()

    def row(self, row: Mapping[str, Any]) -> None:
        """Move the bar to a train row; any other row is a line above it."""
        line = describe(row, self._total)
        if row["split"] == "train":   # the bar has the step itself
            self._progress.update(self._task, completed=row["step"], line=line.split("  ", 1)[-1])
        else:
            self.say(line)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()


def progress(total_steps: int) -> Bar | Lines:
    """What fits where stderr goes."""
    return Bar(total_steps) if LastingStderr().isatty() else Lines(total_steps)
