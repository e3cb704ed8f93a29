"""Weights & Biases: the rows of a run in its dashboard, kept below RUN/wandb, all starts of a run under one id.

A tracker may fail: that is told once, and the run goes on. A copy of a run directory is another run.
"""
import logging
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pretrain.config import TrainConfig
from scgpt.files import remove, write_bytes

_DIRS = ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
WANDB, RUN_ID = "wandb", "run-id.txt"


class Tracker:
    """The run's W&B run; does nothing where tracking is disabled or cannot start.

    Args:
        run: the run directory.
        config: of the run.
        failed: is told in one sentence what went wrong.
        copied: is told in one sentence that this run is a copy, and tracked apart from the other.
    """

    def __init__(self, run: Path, config: TrainConfig, *, failed: Callable[[str], None],
                 copied: Callable[[str], None]) -> None:
        self._failed, self._copied = failed, copied
        self._run = None
        try:
            self._run = self._start(run, config)
        except OSError as error:
            failed(f"wandb cannot start ({_first_line(error)}): the run is not tracked; metrics.jsonl holds all")

    def log(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl: train rows under their own names, others under SPLIT/."""
        prefix = "" if row["split"] == "train" else f"{row['split']}/"
        tracked = {f"{prefix}{key}": value for key, value in row.items()
                   if key not in ("step", "split") and value is not None}
        self._call(lambda run: run.log(tracked, step=row["step"]))

    def finish(self) -> None:
        """Hand over what is left."""
        self._call(lambda run: run.finish())

    def _call(self, call: Callable[[Any], None]) -> None:
        """Call the tracker's run, where there is one; the first failure is told and ends the tracking, not the run."""
        if self._run is None:
            return
        try:
            call(self._run)
        except Exception as error:  # noqa: BLE001 whatever the tracker raises
            self._run = None
            with suppress(OSError):
                self._failed(f"wandb failed ({_first_line(error)}): the run goes on without it; metrics.jsonl holds "
                             "all")

    def _start(self, run: Path, config: TrainConfig) -> Any:
        if config.tracking.wandb == "disabled":
            return None
        folder = (run / WANDB).resolve()
        folder.mkdir(exist_ok=True)
        for name in _DIRS:
            os.environ.setdefault(name, str(folder if name != "WANDB_DIR" else run.resolve()))
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.pop("WANDB_SERVICE", None)   # a parent's: it would end with that, and not be torn down by us
        logging.raiseExceptions = False   # wandb's own log on a full disk: no traceback for every line
        for left in folder.glob("tmp*wandb-*"):   # of a start that was killed
            remove(left)
        with _temporary_files_in(folder):
            return self._init(run, config, run_id(run, self._copied))

    def _init(self, run: Path, config: TrainConfig, identity: str) -> Any:
        try:
            import wandb
        except ImportError:
            self._failed("wandb is not installed: the run is not tracked; metrics.jsonl holds all")
            return None
        for mode in dict.fromkeys((config.tracking.wandb, "offline")):
            try:
                return wandb.init(project=config.tracking.project, name=run.resolve().name, mode=mode, id=identity,
                                  resume="allow" if mode == "online" else None,   # offline, `wandb sync` joins them
                                  dir=run.resolve(), config=config.model_dump(mode="json"), allow_val_change=True,
                                  settings=wandb.Settings(init_timeout=30, console="off", x_disable_stats=True))
            except Exception as error:  # noqa: BLE001 whatever the tracker raises
                self._failed(f"wandb ({mode}) cannot start: {_first_line(error)}")
                with suppress(Exception):
                    wandb.teardown()   # else its service may hold the run's id for the start that it gave up
        return None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else repr(error)


def run_id(run: Path, copied: Callable[[str], None]) -> str:
    """The id under which every start of this run is tracked; RUN/wandb/run-id.txt holds it and the run directory.

    It is made once, and anew where that file is damaged or the run is a copy of one that is still there: both would
    write to one W&B run. A run that was moved keeps it. `copied` is told.
    """
    path, here = run / WANDB / RUN_ID, str(run.resolve())
    found, place = _read_id(path)
    if not re.fullmatch(r"[0-9A-Za-z_-]+", found):
        found, place = secrets.token_hex(4), ""
    elif place != here and _is_still_in(Path(place), found, run):
        before, found = found, secrets.token_hex(4)
        copied(f"this run is a copy of {place}, which is tracked as {before}: from here on it is tracked as {found}")
    if place != here:
        write_bytes(path, os.fsencode(f"{found}\n{here}\n"))
    return found


def _read_id(path: Path) -> tuple[str, str]:
    """The id and the run directory in a file; empty where it does not say (earlier versions wrote the id alone)."""
    found, _, place = os.fsdecode(path.read_bytes() if path.exists() else b"").partition("\n")
    return found.strip(), place.removesuffix("\n")


def _is_still_in(place: Path, identity: str, run: Path) -> bool:
    """Whether the run directory `place` holds the id, and is another one than `run`; one of somebody else's may be."""
    try:
        return _read_id(place / WANDB / RUN_ID)[0] == identity and not place.samefile(run)
    except PermissionError:
        return True
    except (OSError, ValueError):   # not a path at all, or of a file system that is gone
        return False


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """wandb makes temporary folders when it is imported, and leaves them when it is killed: not in the system's."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
