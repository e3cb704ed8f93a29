from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from scgpt.config import Bytes, Config, ConfigPath, Seed, load_config, read_values, shipped_configs, validate
from scgpt.errors import ConfigError

Share = Annotated[float, Field(gt=0, lt=1)]


class Inner(Config):
    micro_batch_size: int = 4
    rate: float = 0.1
    word: str = "on"
    size: Bytes = 1
    path: ConfigPath | None = None


class Outer(Config):
    batch: Inner = Inner()
    items: list[Inner] = []
    seed: Seed = 0
    ratio: Share | list[Share] = 0.5
    stage: Literal[0, 1, 2] = 2
    loud: bool | Literal["very"] = False
    pair: tuple[float, float] = (0.1, 0.9)


class Item(Config):
    path: str


class Many(Config):
    sources: Annotated[list[Item], Field(min_length=1)]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def fault(config: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, config, overrides, kind="pretrain")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mistyped_key_is_refused_with_file_line_and_nearest_name(tmp_path: Path):
    message = fault(write(tmp_path / "a.yaml", "seed: 1\nbatch:\n  micro_batchsize: 2\n"))
    assert "unknown key 'batch.micro_batchsize'" in message
    assert "a.yaml:3" in message
    assert "did you mean 'micro_batch_size'?" in message
    assert "Allowed: micro_batch_size, rate" in message


def test_a_mistyped_key_inside_a_list_names_its_place(tmp_path: Path):
    message = fault(write(tmp_path / "a.yaml", "items:\n- {rate: 1}\n- {ratte: 2}\n"))
    assert "'items.1.ratte'" in message
    assert "a.yaml:3" in message
    assert "did you mean 'rate'?" in message


@pytest.mark.parametrize("include", ["5", "{a: b}", "[1]"])
def test_an_include_that_is_no_path_is_refused(tmp_path: Path, include: str):
    assert "wrong value of 'include'" in fault(write(tmp_path / "a.yaml", f"include: {include}\n"))


def test_a_list_that_is_missing_is_named_itself():
    with pytest.raises(ConfigError, match=r"the key 'sources' is missing; .*sources=\.\.\."):
        validate(Many, {})


class Either(Config):
    corpus: str | Annotated[list[Item], Field(min_length=1)]
    workers: int = 0


class Nested(Config):
    data: Either
    seed: int = 0


@pytest.mark.parametrize(("overrides", "says"), [
    (["seed=1"], r"the key 'data\.corpus' is missing; set it in the file or give data\.corpus=\.\.\.$"),
    (["data.workers=1"], r"the key 'data\.corpus' is missing; set it in the file or give data\.corpus=\.\.\.$"),
    (["data.corpsu=a"], r"unknown key 'data\.corpsu' \(command line: data\.corpsu=a\); did you mean 'corpus'\?"),
    (["daat.corpus=a"], r"unknown key 'daat' \(command line: daat\.corpus=a\); did you mean 'data'\?"),
    (["data.corpus=[{pathh: a}]"], r"unknown key 'data\.corpus\.0\.pathh' .* did you mean 'path'\?"),
    (["data.corpus=[{}]"], r"the key 'data\.corpus\.0\.path' is missing"),
])
def test_a_required_key_that_was_mistyped_is_told_as_mistyped_and_a_missing_one_by_its_own_name(
        tmp_path: Path, overrides: list[str], says: str):
    with pytest.raises(ConfigError, match=says):
        load_config(Nested, write(tmp_path / "a.yaml", ""), overrides, kind="pretrain")


def test_later_files_and_the_command_line_override_key_by_key(tmp_path: Path):
    write(tmp_path / "base" / "b.yaml", "seed: 1\nbatch: {rate: 0.5, micro_batch_size: 8}\n")
    config = load_config(Outer, write(tmp_path / "a.yaml", "include: base/b.yaml\nbatch: {rate: 0.25}\n"),
                         ["seed=7"], kind="pretrain")
    assert (config.seed, config.batch.rate, config.batch.micro_batch_size) == (7, 0.25, 8)


def test_scalars_follow_yaml_1_2_in_files_and_on_the_command_line(tmp_path: Path):
    path = write(tmp_path / "a.yaml", "batch: {rate: 1e-4, word: off}\n")
    assert load_config(Outer, path, kind="pretrain").batch.model_dump() | {"path": None} == {
        "micro_batch_size": 4, "rate": 1e-4, "word": "off", "size": 1, "path": None}
    overridden = load_config(Outer, path, ["batch.rate=5e-5", "batch.word=no", "batch.size=2MiB"], kind="pretrain")
    assert (overridden.batch.rate, overridden.batch.word, overridden.batch.size) == (5e-5, "no", 2 << 20)


def test_a_path_is_relative_to_the_file_it_stands_in_or_to_the_working_directory(tmp_path, monkeypatch):
    write(tmp_path / "deep" / "b.yaml", "batch: {path: cells.h5ad}\n")
    outer = write(tmp_path / "a.yaml", "include: [deep/b.yaml]\n")
    assert load_config(Outer, outer, kind="pretrain").batch.path == tmp_path.resolve() / "deep" / "cells.h5ad"
    monkeypatch.chdir(tmp_path)
    assert load_config(Outer, outer, ["batch.path=x.h5ad"], kind="pretrain").batch.path == Path.cwd() / "x.h5ad"


def test_the_resolved_tree_reads_back_equal(tmp_path: Path):
    path = write(tmp_path / "a.yaml", "items: [{rate: 2, path: p}]\n")
    config = load_config(Outer, path, ["seed=3"], kind="pretrain")
    again = load_config(Outer, write(tmp_path / "elsewhere" / "b.yaml", config.to_yaml()), kind="pretrain")
    assert again == config


@pytest.mark.parametrize(("text", "says"), [
    ("seed: [1", "not YAML"), ("seed: &a [*a]", "nested without end"),
    pytest.param(f"seed: {'[' * 3000}", "nested without end", id="deep"),
    ("- 1\n", "must be a mapping"),
    ("seed: 1\nseed: 2\n", "written twice"),
    ("seed: x\n", "wrong value of 'seed' = 'x'"),
    ("include: a.yaml\n", "includes itself"),
    ("include: missing.yaml\n", "cannot be read"),
])
def test_a_file_that_is_wrong_is_refused_in_one_sentence(tmp_path: Path, text: str, says: str):
    assert says in fault(write(tmp_path / "a.yaml", text))


@pytest.mark.parametrize(("text", "place", "says"), [
    ('path: s3://me:s3cret@bucket\nseed: "s3cret', "a.yaml:2:14", "found unexpected end of stream"),
    ("batch: {path: 's3://me:s3cret@bucket'\nseed: 1", "a.yaml:2:1", "expected ',' or '}', but got '<scalar>'"),
    ("batch: *s3cret", "a.yaml:1:8", "found undefined alias"),
    ("seed: &s3cret 1\nbatch: &s3cret 2", "a.yaml:2:8", "found duplicate anchor"),
    ("batch: s3cret\nseed: %s3cret", "a.yaml:2:7", "found character '%' that cannot start any token"),
    ("seed: s3cret\n  s3cret: 1", "a.yaml:2:9", "mapping values are not allowed here"),
    ("seed: 's3cret\x00'", "a.yaml", "control character"),
])
def test_a_file_that_is_no_yaml_is_told_by_place_and_reason_not_by_its_text(tmp_path: Path, text: str, place: str,
                                                                            says: str):
    message = fault(write(tmp_path / "a.yaml", text))
    assert f"{place})" in message
    assert says in message
    assert "s3cret" not in message


@pytest.mark.parametrize("override", ["seed=[s3cret", "batch.word='s3cret", "seed=*s3cret", "s3://me:s3cret@bucket"])
def test_an_override_that_is_no_yaml_is_not_quoted(tmp_path: Path, override: str):
    assert "s3cret" not in fault(write(tmp_path / "a.yaml", "seed: 1\n"), override)


@pytest.mark.parametrize(("override", "says"), [
    ("seed", "not a setting"), ("=1", "not a setting"), ("seed=[", "not YAML"),
    pytest.param(f"seed={'[' * 3000}", "not YAML", id="deep"),
    ("sede=1", "did you mean 'seed'?"),
    ("batch.rate=.inf", "wrong value of 'batch.rate' = inf"), ("batch.rate=.nan", "wrong value of 'batch.rate'"),
    (f"seed={2**63}", "wrong value of 'seed'"), ("seed=-1", "wrong value of 'seed'"),
    ("ratio=2", "wrong value of 'ratio' = 2"), ("ratio=[0.1, 2]", "wrong value of 'ratio"),
])
def test_an_override_that_is_wrong_is_refused_in_one_sentence(tmp_path: Path, override: str, says: str):
    assert says in fault(write(tmp_path / "a.yaml", "seed: 1\n"), override)


@pytest.mark.parametrize("setting", ["batch.rate=true", "batch.micro_batch_size=true", "batch.size=false", "seed=true",
                                     "ratio=true", "ratio=[0.5,true]", "stage=true", "pair=[true,0.5]"])
def test_true_is_no_number(tmp_path: Path, setting: str):
    key = setting.partition("=")[0]
    assert f"wrong value of '{key}'" in (message := fault(write(tmp_path / "a.yaml", ""), setting))
    assert "a number is wanted" in message


@pytest.mark.parametrize("setting", ["items=a", "items={a: 1}", "pair=0.5"])
def test_what_must_be_a_list_is_called_one(tmp_path: Path, setting: str):
    assert "a list is wanted, in brackets" in fault(write(tmp_path / "a.yaml", ""), setting)


@pytest.mark.parametrize(("setting", "value"), [("true", True), ("false", False), ("very", "very")])
def test_a_switch_is_still_one(tmp_path: Path, setting: str, value: object):
    loaded = load_config(Outer, write(tmp_path / "a.yaml", ""), [f"loud={setting}"], kind="pretrain")
    assert (type(loaded.loud), loaded.loud) == (type(value), value)


def test_a_file_includes_what_ships_by_its_name(tmp_path: Path):
    path = write(tmp_path / "a.yaml", "include: [demo, mine.yaml]\ntrain: {max_steps: 7}\n")
    write(tmp_path / "mine.yaml", "train: {max_steps: 5, log_every: 5}\n")
    ships = read_values(shipped_configs("pretrain")["demo"], kind="pretrain")
    assert read_values(path, kind="pretrain") == {**ships, "train": {**ships["train"], "max_steps": 7, "log_every": 5}}
    with pytest.raises(ConfigError, match=r"there is no pretrain configuration 'dmeo'; did you mean 'demo'\?"):
        read_values(write(tmp_path / "b.yaml", "include: dmeo\n"), kind="pretrain")


def test_an_unknown_name_lists_what_ships(tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no pretrain configuration 'dmeo'"):
        load_config(Outer, "dmeo", kind="pretrain")
    with pytest.raises(ConfigError, match="there is no pretrain configuration 'blood', it is one of corpus; give"):
        load_config(Outer, "blood", kind="pretrain")
