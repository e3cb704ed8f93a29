import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from launch import cli
from scgpt.errors import CheckpointError, ConfigError, DataError, ScgptError
from tests.data_pipeline.atlases import random_counts
from tests.data_pipeline.sources.formats import lists_of, write_vocab
from tests.scgpt.data.cells import random_cells, write_corpus

COMMANDS = ["data plan", "data build", "data peek", "data verify", "data inspect", "data convert", "train", "export",
            "verify", "embed", "report", "vocab build", "config show", "config list"]


def scgpt(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launch.cli", *words], capture_output=True, text=True, timeout=120,
                          check=False)


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full")  # noqa: PTH110
def test_an_answer_that_cannot_be_written_is_one_sentence():
    with open("/dev/full", "w") as full:  # noqa: PTH123
        done = subprocess.run([sys.executable, "-m", "launch.cli", "config", "list"], stdout=full,
                              stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: what was done cannot be told: No space left on device (stdout); ")
    assert done.stderr.count("\n") == 1


def test_help_answers_in_under_a_second():
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        assert scgpt("--help").returncode == 0
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_help_starts_with_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]):
    text = help_of(command, capsys)
    description = text.partition("\n\n")[2]
    assert description.startswith("example:\n  scgpt " + command)
    example = description.splitlines()[1].split()[1:]
    args, rest = cli.build_parser().parse_known_args(example)
    assert args.run.__name__ == command.replace(" ", "_")
    assert not rest


def test_a_reader_who_has_seen_enough_is_no_failure():
    process = subprocess.Popen([sys.executable, "-m", "launch.cli", "config", "list"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0
    process.stderr.close()


def test_an_interruption_stays_one_where_the_answer_is_lost(monkeypatch: pytest.MonkeyPatch):
    def lose(text: str) -> None:
        raise DataError("lost")
    monkeypatch.setattr(cli, "print_answer", lose)
    monkeypatch.setattr(cli, "config_list", lambda args: cli.Answer("", exit_code=75))
    assert cli.main(["config", "list"]) == 75
    monkeypatch.setattr(cli, "config_list", lambda args: cli.Answer(""))
    assert cli.main(["config", "list"]) == 1


def test_settings_are_taken_before_and_after_flags():
    parser = cli.build_parser()
    args, rest = parser.parse_known_args(["data", "build", "demo", "seed=1", "--out", "x", "seed=2", "a.b=[1, 2]"])
    cli._take_overrides(parser, args, rest)
    assert args.overrides == ["seed=1", "seed=2", "a.b=[1, 2]"]


@pytest.mark.parametrize("words", [
    ["data", "build", "demo"],                            # no --out
    ["data", "build", "demo", "--out", "x", "word"],      # not key=value
    ["data", "build", "demo", "--out", "x", "--nosuch=1"],
    ["verify", "x", "seed=1"],                            # takes no settings
    ["export", "run", "--out", ""],
    ["data", "build", "demo", "--out", "s3://bucket/corpus"],
    ["embed", "x", "y.h5ad", "--out", "z.h5ad", "--seed", "-1"],
    ["embed", "x", "y.h5ad", "--out", "z.h5ad", "--seed", str(2**63)],
    ["nosuch"], ["data"], [],
])
def test_bad_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_libraries_tell_of_warnings_only_and_the_package_of_more():
    told = ("import logging; from launch import cli; cli.main(['config', 'list']);"
            "[logging.getLogger(name).info(f'by {name}') for name in ('fsspec', 'scgpt')]")
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == "by scgpt\n"


def test_settings_are_not_asked_for(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        cli.main(["data", "plan"])
    assert capsys.readouterr().err.endswith("the following arguments are required: CONFIG\n")


@pytest.mark.parametrize(("error", "code"), [
    (ConfigError("wrong", where="here", fix="mend it"), 2), (DataError("wrong", where="here", fix="mend it"), 1),
    (CheckpointError("wrong", where="here", fix="mend it"), 1),
])
def test_an_error_is_one_sentence_and_its_class_sets_the_code(
        error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def fail(args: object) -> cli.Answer:
        raise error
    monkeypatch.setattr(cli, "config_list", fail)
    assert cli.main(["config", "list"]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == f"error: {error}\n"
    if isinstance(error, ScgptError):
        assert shown.err == "error: wrong (here); mend it\n"
    assert cli.main(["config", "list", "--debug"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_a_fault_of_ours_is_not_swallowed(monkeypatch: pytest.MonkeyPatch):
    def fail(args: object) -> cli.Answer:
        raise ZeroDivisionError
    monkeypatch.setattr(cli, "config_list", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["config", "list"])


def test_an_interrupt_says_that_the_command_continues(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def interrupt(args: object) -> cli.Answer:
        raise KeyboardInterrupt
    monkeypatch.setattr(cli, "config_list", interrupt)
    assert cli.main(["config", "list"]) == 75
    assert "the same command continues" in capsys.readouterr().err


def test_sigterm_is_an_interruption_and_the_answer_to_it_is_given_back(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "config_list", lambda args: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main(["config", "list"]) == 75
    assert "the same command continues" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before


def test_json_is_one_object_on_the_last_line_of_stdout():
    run = scgpt("config", "list", "--json")
    assert run.returncode == 0
    assert "demo" in json.loads(run.stdout.splitlines()[-1])["corpus"]


def test_a_name_that_does_not_ship_is_answered_with_those_that_do(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "show", "dmeo", "--kind", "corpus"]) == 2
    assert "did you mean 'demo'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["demo"])
def test_what_ships_as_a_corpus_resolves(name: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "show", name, "--kind", "corpus", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"]


def test_a_recipe_that_ships_asks_for_its_corpus(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "show", "demo"]) == 2
    assert "give data.corpus=..." in capsys.readouterr().err
    assert cli.main(["config", "show", "demo", "data.corpus=x", "train.seed=7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["seed"] == 7


@pytest.mark.parametrize("command", ["data verify", "verify"])
def test_a_folder_that_is_not_there_is_one_sentence(command: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main([*command.split(), "no/such/folder"]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert "no/such/folder" in shown.err


@pytest.mark.parametrize(("module", "extra"), [("torch", "model"), ("deepspeed.comm", "train"), ("ray", "data")])
def test_a_package_that_is_not_installed_is_one_sentence_with_the_command(monkeypatch, capsys, module, extra):
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr("scgpt.data.verify_corpus", fail)
    assert cli.main(["data", "verify", "corpus"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"pip install '.[{extra}]'" in said


def test_a_table_of_lists_is_inspected_by_its_gene_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    parquet.write_table(pa.table(lists_of(random_counts(0, 30, 40))), tmp_path / "a.parquet")
    table = write_vocab(tmp_path / "genes.json", 40)
    assert cli.main(["data", "inspect", str(tmp_path / "a.parquet"), "--gene-table", str(table), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["kind"], facts["genes"], facts["gene_columns"]["index"]["mapped"]) == ("lists", 40, 40)
    assert cli.main(["data", "inspect", str(tmp_path / "a.parquet")]) == 2
    assert capsys.readouterr().err.startswith("error: a table of lists holds gene ids, not what they stand for")


def test_a_module_of_ours_that_is_missing_stays_a_traceback(monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'scgpt.nothing'", name="scgpt.nothing")

    monkeypatch.setattr("scgpt.data.verify_corpus", fail)
    with pytest.raises(ModuleNotFoundError):
        cli.main(["data", "verify", "corpus"])


def test_a_corpus_is_converted_and_wrong_settings_are_one_sentence(tmp_path: Path, capsys):
    write_corpus(tmp_path / "corpus", {"train": [random_cells([5, 9, 1])]})
    words = ["data", "convert", str(tmp_path / "corpus"), "form=zarr", "--out", str(tmp_path / "cold")]
    assert cli.main([*words, "compression=lz4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["form"], answer["compression"], answer["splits"]["train"]["cells"]) == ("zarr", "lz4", 3)
    assert cli.main(["data", "verify", "--deep", str(tmp_path / "cold")]) == 0
    capsys.readouterr()
    assert cli.main(words) == 2
    assert "exists already" in capsys.readouterr().err
    for wrong, says in (("form=parquet", "wrong value of 'form'"), ("from=zarr", "unknown key 'from'")):
        assert cli.main([*words[:3], wrong, "--out", str(tmp_path / "other")]) == 2
        assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cold", "corpus"]
