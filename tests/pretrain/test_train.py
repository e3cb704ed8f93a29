import json
import os
import signal
import subprocess
import sys

import pytest

from pretrain.train import main
from tests.pretrain import runs


def test_what_deepspeed_is_given_can_be_printed_without_a_corpus_or_a_run(capsys):
    assert main(["demo", "data.corpus=nowhere", "--print-deepspeed-config", "deepspeed.zero_stage=1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["zero_optimization"]["stage"] == 1
    assert printed["train_batch_size"] == 16


@pytest.mark.parametrize(("words", "says"), [
    (["demo", "data.corpus=x"], "there is no run directory (command line); give --out RUN"),
    (["demo", "--out", "run"], "is missing"),
    (["demmo", "data.corpus=x", "--out", "run"], "did you mean 'demo'"),
    (["demo", "data.corpus=x", "--out", "run", "optimizer.lrr=1"], "did you mean 'lr'"),
])
def test_wrong_usage_is_one_sentence_and_exit_code_2(capsys, words, says):
    assert main(words) == 2
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_a_run_is_not_written_to_a_url(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "data.corpus=x", "--out", "s3://bucket/run"])
    assert "is a URL" in capsys.readouterr().err


def test_a_folder_that_is_no_corpus_is_one_sentence_and_leaves_no_run_behind(capsys, tmp_path):
    assert main(["demo", f"data.corpus={tmp_path}", "--out", str(tmp_path / "run")]) == 1
    assert "not a corpus" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("setting", "says", "code"), [
    ("batch.global_batch_size=7", "no multiple", 2), ("optimizer.lr=.inf", "wrong value of 'optimizer.lr' = inf", 2),
])
def test_what_cannot_be_trained_leaves_no_run_behind(capsys, tmp_path, setting, says, code):
    corpus = runs.make_corpus(tmp_path / "corpus")
    assert main(["demo", f"data.corpus={corpus}", *runs.SETTINGS, setting, "--out", str(tmp_path / "run")]) == code
    errors = capsys.readouterr().err
    assert says in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_failure_of_one_rank_alone_is_told_by_it(capsys, monkeypatch):
    def fail(args):
        raise MemoryError("Unable to allocate 9 TiB")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("pretrain.train._run", fail)
    assert main(["demo", "--out", "run"]) == 1
    assert capsys.readouterr().err.startswith("error: rank 1: the memory is used up: Unable to allocate 9 TiB; make")


def test_other_ranks_say_nothing_of_what_rank_0_says(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["demo", "--out", "run"]) == 2
    assert capsys.readouterr().err == ""


def test_settings_may_stand_on_both_sides_of_a_flag(capsys):
    words = ["demo", "data.corpus=x", "--print-deepspeed-config", "batch.global_batch_size=24", "--local_rank=0"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["train_batch_size"] == 24


def test_as_a_script_it_finds_the_package_beside_it_from_any_directory(tmp_path):
    program = runs.ROOT / "pretrain" / "train.py"
    done = subprocess.run([sys.executable, str(program), "demo", "data.corpus=x", "--print-deepspeed-config"],
                          cwd=tmp_path, capture_output=True, text=True, check=False,
                          env={"PATH": os.environ["PATH"], "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_the_run_has_begun_is_an_interruption(capsys, monkeypatch, number):
    monkeypatch.setattr("pretrain.train._run", lambda args: os.kill(os.getpid(), number))
    assert main(["demo", "--out", "run"]) == 75
    assert capsys.readouterr().err == "interrupted: the same command continues\n"
