"""Whole trainings, killed, interrupted and continued; real processes."""
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import checkpoint
from pretrain.checkpoint import steps_of
from pretrain.metrics import read_rows
from scgpt.files import json_bytes
from tests.pretrain import runs

pytestmark = [pytest.mark.slow, pytest.mark.system]
STEPS = 120
FIRST_VERSION = {"step", "cells_seen", "tokens_seen", "best_step", "best_loss", "gene_mean_loss", "last_valid",
                 "window", "world_size", "zero_stage", "precision", "corpus", "config", "versions"}   # of state.json
SETTINGS = (f"train.max_steps={STEPS}", "model.dropout=0.1", "model.attention_dropout=0.1")


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Number of ranks -> a run that nothing disturbed."""
    outs = {}
    for ranks in (1, 2):
        outs[ranks] = tmp_path_factory.mktemp("uninterrupted") / "run"
        code, errors = runs.train(corpus, outs[ranks], *SETTINGS, ranks=ranks)
        assert code == 0, errors
    return outs


def assert_same_run(out: Path, other: Path) -> None:
    assert runs.curve(out) == runs.curve(other)
    ours, theirs = runs.weights(out), runs.weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_killed_and_continued_equals_uninterrupted_to_the_bit(corpus, uninterrupted, tmp_path):
    process = runs.start(corpus, tmp_path / "run", *SETTINGS)
    runs.wait_for_step(process, tmp_path / "run", 35)
    runs.kill_all(process, tmp_path / "run")
    assert "finished" not in runs.events(tmp_path / "run")
    code, errors = runs.train(corpus, tmp_path / "run", *SETTINGS)
    assert code == 0, errors
    assert "resume" in runs.events(tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.py"))
    assert_same_run(tmp_path / "run", uninterrupted[1])


def test_crashes_at_random_steps_change_no_bit(corpus, uninterrupted, tmp_path):
    """One run on two ranks that loses a rank, loses all, is asked to end, and so on, and is continued each time."""
    out, n_crashes = tmp_path / "run", 10 if runs.FULL else 3
    steps = np.sort(np.random.default_rng(n_crashes).choice(np.arange(8, 70), n_crashes, replace=False))
    for number, step in enumerate(steps.tolist()):
        process = runs.start(corpus, out, *SETTINGS, ranks=2)
        runs.wait_for_start(process, out, number + 1)
        runs.wait_for_step(process, out, step)
        code = crash(process, out, ("one", "all", "asked")[number % 3])
        assert code not in {0, None}, (step, code)
        assert (code == 75) == (number % 3 == 2), (step, code)
    assert "finished" not in runs.events(out)
    code, errors = runs.train(corpus, out, *SETTINGS, ranks=2)
    assert code == 0, errors
    assert_same_run(out, uninterrupted[2])


def test_a_crash_on_two_ranks_goes_on_on_one_with_the_curve_of_two(corpus, tmp_path):
    """Without dropout, but with batches of 2 cells before and of 4 after; every row that either has written."""
    settings = ("train.max_steps=60", "train.save_every=10", "optimizer.eps=1e-4")
    code, errors = runs.train(corpus, tmp_path / "whole", *settings, ranks=2)
    assert code == 0, errors
    out = tmp_path / "run"
    process = runs.start(corpus, out, *settings, ranks=2)
    runs.wait_for_step(process, out, 25)
    runs.kill_all(process, out)
    assert "finished" not in runs.events(out)
    code, errors = runs.train(corpus, out, *settings, "batch.micro_batch_size=4")
    assert code == 0, errors
    assert "ranks 2 -> 1" in errors
    assert "micro_batch_changed" not in runs.events(out)   # nothing depends on it
    whole, found = runs.curve(tmp_path / "whole"), runs.curve(out)
    assert found.keys() == whole.keys()
    for key, row in whole.items():
        losses = {name: value for name, value in row.items() if name.startswith("loss")}
        assert {name: found[key][name] for name in losses} == pytest.approx(losses, rel=1e-4), key


def test_a_micro_batch_of_another_size_is_told_where_something_depends_on_it(corpus, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    more = (*SETTINGS[1:], f"train.max_steps={STEPS + 1}", "batch.micro_batch_size=4")
    code, errors = runs.train(corpus, tmp_path / "run", *more)
    assert code == 0, errors
    assert "warning: dropout will differ from the uninterrupted run's: a micro-batch had 2 cells on 1 rank" in errors
    (event,) = [row for row in read_rows(tmp_path / "run" / "events.jsonl") if row["event"] == "micro_batch_changed"]
    assert (event["step"], event["micro_batch_size"], event["terms"]) == (STEPS, [2, 4], ["dropout"])


def test_a_checkpoint_of_an_older_version_goes_on_to_the_bit(corpus, uninterrupted, tmp_path):
    """One that knows only what the first version wrote: no digests of tensors, no loss scale, roll-backs, probe."""
    out = Path(shutil.copytree(uninterrupted[1], tmp_path / "run"))
    shutil.rmtree(checkpoint.find(out, str(STEPS)))
    folder = checkpoint.find(out, "100")
    state = {key: value for key, value in runs.state_of(out, "100").items() if key in FIRST_VERSION}
    assert len(state) == len(FIRST_VERSION)
    (folder / "state.json").write_bytes(json_bytes(state | {"digests": ["of one rank's tensors"]}))
    runs.sign(folder)
    code, errors = runs.train(corpus, out, *SETTINGS)
    assert code == 0, errors
    assert f"continuing from step 100 of {STEPS}" in errors
    assert_same_run(out, uninterrupted[1])


def crash(process: "subprocess.Popen[str]", out: Path, how: str) -> int | None:
    """kill -9 of one rank, of everything, or SIGTERM to the ranks; the job's exit code."""
    if how == "all":
        runs.kill_all(process, out)
    else:
        ranks = runs.rank_processes(out)
        for rank in ranks[1:] if how == "one" else ranks:
            os.kill(rank, signal.SIGKILL if how == "one" else signal.SIGTERM)
        process.communicate(timeout=200)
        runs.wait_until_gone(ranks)
    return process.returncode


def test_a_signal_to_the_ranks_saves_exits_75_and_loses_nothing(corpus, uninterrupted, tmp_path):
    out, number = tmp_path / "run", signal.SIGUSR1
    process = runs.start(corpus, out, *SETTINGS, ranks=2)
    runs.wait_for_step(process, out, 25)
    for rank in runs.rank_processes(out):
        os.kill(rank, number)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 75, errors
    assert f"interrupted after step {steps_of(out / 'checkpoints')[-1]} (signal {number.name})" in errors
    code, errors = runs.train(corpus, out, *SETTINGS, ranks=2)
    assert code == 0, errors
    assert_same_run(out, uninterrupted[2])


def test_ranks_whose_launcher_is_killed_save_and_end_and_a_restart_waits_for_them(corpus, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = runs.start(corpus, out, *SETTINGS, ranks=2)
    runs.wait_for_step(process, out, 25)
    process.kill()   # the launcher alone: its ranks get no signal
    process.communicate()
    code, errors = runs.train(corpus, out, *SETTINGS, ranks=2)
    assert code == 0, errors
    assert "interrupted" in runs.events(out)
    assert_same_run(out, uninterrupted[2])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_reader_goes_away_trains_to_its_end(corpus, uninterrupted, tmp_path, ranks):
    """`scgpt train ... 2>&1 | head -1`."""
    process = runs.start(corpus, tmp_path / "run", *SETTINGS, ranks=ranks, errors=subprocess.STDOUT)
    assert process.stdout is not None
    while "step " not in (line := process.stdout.readline()):
        assert line, process.wait()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert_same_run(tmp_path / "run", uninterrupted[ranks])


def test_a_damaged_checkpoint_is_skipped_and_told(corpus, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = runs.start(corpus, out, *SETTINGS)
    runs.wait_for_step(process, out, 25)   # one checkpoint is of step 20
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    newest = out / "checkpoints" / f"step-{steps_of(out / 'checkpoints')[-1]:08d}"
    victim = next(newest.glob("*optim_states.pt"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (out / "checkpoints" / ".tmp-step-00009999").mkdir()
    code, errors = runs.train(corpus, out, *SETTINGS)
    assert code == 0, errors
    assert f"checkpoint {newest.name} is skipped" in errors
    assert "checkpoint step-00009999 was being written" in errors
    assert not (out / "checkpoints" / ".tmp-step-00009999").exists()
    assert_same_run(out, uninterrupted[1])


def test_a_finished_run_says_so_and_a_higher_limit_continues_it(corpus, uninterrupted):
    out = uninterrupted[1]
    code, errors = runs.train(corpus, out, *SETTINGS)
    assert code == 0
    assert f"the run is finished: {STEPS} of {STEPS} steps are done" in errors


def test_the_loss_curve_is_the_same_on_one_and_two_ranks(uninterrupted, corpus, tmp_path):
    outs = []
    for ranks in (1, 2):   # without dropout nothing but the order of additions differs
        outs.append(tmp_path / str(ranks))
        code, errors = runs.train(corpus, outs[-1], "train.max_steps=20", ranks=ranks)
        assert code == 0, errors
    alone, spread = map(runs.curve, outs)
    assert alone.keys() == spread.keys()
    for key, row in alone.items():
        assert spread[key]["loss"] == pytest.approx(row["loss"], rel=1e-4)
        assert spread[key]["cells_seen" if "cells_seen" in row else "step"] == row.get("cells_seen", row["step"])
    baselines = [runs.state_of(out)["gene_mean_loss"] for out in outs]
    assert baselines[0] == pytest.approx(baselines[1], rel=1e-12)


@pytest.mark.parametrize(("settings", "ranks", "code", "says"), [
    (("optimizer.lr=0.1",), 1, 2, "optimizer.lr: 0.003 -> 0.1"),
    (("train.max_steps=999", "batch.micro_batch_size=3"), 1, 2, "set batch.micro_batch_size=2"),
])
def test_what_cannot_be_continued_is_refused_in_one_sentence(corpus, uninterrupted, settings, ranks, code, says):
    before = json.dumps(sorted(map(str, (uninterrupted[1] / "checkpoints").rglob("*"))))
    found, errors = runs.train(corpus, uninterrupted[1], *SETTINGS, *settings, ranks=ranks)
    assert found == code, errors
    assert says in errors
    assert "Traceback" not in errors
    assert sum(line.startswith("error: ") for line in errors.splitlines()) == 1
    assert json.dumps(sorted(map(str, (uninterrupted[1] / "checkpoints").rglob("*")))) == before


def test_a_run_goes_on_on_more_ranks_and_in_another_stage_and_says_so(corpus, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted[1], tmp_path / "run")
    before = runs.state_of(tmp_path / "run")["step"]
    code, errors = runs.train(corpus, tmp_path / "run", *SETTINGS, f"train.max_steps={before + 2}",
                              "deepspeed.zero_stage=3", "batch.micro_batch_size=1", ranks=2)
    assert code == 0, errors
    assert f"continuing from step {before} of {before + 2}; ranks 1 -> 2; deepspeed.zero_stage 2 -> 3" in errors
    state = runs.state_of(tmp_path / "run")
    assert (state["step"], state["world_size"], state["zero_stage"]) == (before + 2, 2, 3)


def test_a_directory_with_something_else_is_refused(corpus, tmp_path):
    for name in (".lock", "notes.txt"):
        (tmp_path / name).write_text("mine")
    code, errors = runs.train(corpus, tmp_path, *SETTINGS)
    assert code == 2
    assert "the output directory holds something else: notes.txt" in errors   # what the user knows it by
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "notes.txt"}


def test_patience_ends_a_run_with_0_and_counts_on_after_a_resume(corpus, tmp_path):
    """Nothing improves by a million, so the first validation, at step 0, is the one that counts."""
    settings = ("train.max_steps=200", "train.eval_every=10", "train.patience=3", "train.min_improvement=1e6")
    outs = [tmp_path / "whole", tmp_path / "parts"]
    code, errors = runs.train(corpus, outs[0], *settings)
    assert code == 0, errors
    assert "stopped early: 3 validations in a row did not improve" in errors
    code, errors = runs.train(corpus, outs[1], *settings[1:], "train.max_steps=20")   # two of the three validations
    assert code == 0, errors
    code, errors = runs.train(corpus, outs[1], *settings)
    assert code == 0, errors
    for out in outs:
        assert steps_of(out / "checkpoints")[-1] == 30
        assert runs.events(out)[-3:] == ["stopped_early", "checkpoint", "finished"]
    code, errors = runs.train(corpus, outs[0], *settings)
    assert code == 0
    assert "the run is finished: 30 of 200 steps are done; a higher limit or train.patience continues it" in errors
    code, errors = runs.train(corpus, outs[0], *settings[:2], "train.max_steps=35", "train.patience=null")
    assert code == 0, errors
    assert steps_of(outs[0] / "checkpoints")[-1] == 35


def test_a_profile_is_written_and_changes_no_number(corpus, tmp_path):
    for name in ("plain", "--profile"):
        words = [word for word in (name,) if word.startswith("--")]
        code, errors = runs.train(corpus, tmp_path / name, "train.max_steps=8", *SETTINGS[1:], *words)
        assert code == 0, errors
    assert_same_run(tmp_path / "plain", tmp_path / "--profile")
    assert [path.name for path in (tmp_path / "--profile" / "profile").iterdir()] == ["step-00000004-00000006.json.gz"]
    assert not (tmp_path / "plain" / "profile").exists()
