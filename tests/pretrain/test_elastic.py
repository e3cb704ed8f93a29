"""A run goes on on other ranks, in another ZeRO stage and precision: the same weights, moments and curve."""
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.shards import copy_range
from tests.pretrain import runs
from tests.pretrain.runs import FULL, ROOT

SETTINGS = (*runs.SETTINGS, "model.dropout=0", "schedule.kind=constant")
STAGES, UNTIL, END = (0, 1, 2, 3), 2, 4


def run_cases(folder: Path, cases: list[dict[str, Any]], *, ranks: int) -> list[dict[str, Any]]:
    """Run the program; what each case found."""
    content = [case | {"out": str(folder / f"out-{ranks}-{number}.json")} for number, case in enumerate(cases)]
    (folder / "cases.json").write_text(json.dumps(content))
    code, errors = runs.program(ROOT / "tests/pretrain/elastic.py", str(folder / "cases.json"), ranks=ranks)
    assert code == 0, errors
    return [json.loads(Path(case["out"]).read_text()) for case in content]


def case_of(corpus: Path, folder: Path, stage: int, until: int, *settings: str, resume: bool) -> dict[str, Any]:
    return {"settings": [f"data.corpus={corpus}", *SETTINGS, f"deepspeed.zero_stage={stage}", *settings],
            "folder": str(folder), "until": until, "resume": resume}


def close(found: list[float], expected: list[float]) -> bool:
    return len(found) == len(expected) and torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-4)


PAIRS = [((ranks, stage), (to_ranks, to_stage)) for (ranks, stage), (to_ranks, to_stage)
         in product(product((1, 2), STAGES), repeat=2)]
FEW = {   # every stage on every rank count is left once and reached once
    ((1, 0), (2, 3)), ((1, 1), (2, 0)), ((1, 2), (2, 1)), ((1, 3), (2, 2)),
    ((2, 0), (1, 1)), ((2, 1), (1, 3)), ((2, 2), (1, 0)), ((2, 3), (1, 2))}


@pytest.mark.slow
def test_any_stage_goes_on_in_any_other_on_more_or_fewer_ranks(corpus, tmp_path):
    chosen = PAIRS if FULL else [pair for pair in PAIRS if pair in FEW or pair[0] == pair[1]]
    folders = {(ranks, stage): tmp_path / f"from-{ranks}-{stage}" for ranks, stage in product((1, 2), STAGES)}
    begun = {}
    for ranks in (1, 2):
        cases = [case_of(corpus, folders[ranks, stage], stage, UNTIL, resume=False) for stage in STAGES]
        found = run_cases(tmp_path, [*cases, case_of(corpus, tmp_path / f"whole-{ranks}", 0, END, resume=False)],
                          ranks=ranks)
        begun |= {(ranks, stage): one for stage, one in zip(STAGES, found, strict=False)}
        whole = found[-1]["losses"]
        assert all(close(one["losses"], whole[:UNTIL]) for one in found[:-1])
    for ranks in (1, 2):
        pairs = [pair for pair in chosen if pair[1][0] == ranks]
        cases = [case_of(corpus, folders[source], stage, UNTIL, resume=True) for source, (_, stage) in pairs]
        more = [case_of(corpus, folders[source], stage, END, resume=True) for source, (_, stage) in pairs]
        found = run_cases(tmp_path, [*cases, *more], ranks=ranks)
        for (source, target), loaded, went_on in zip(pairs, found, found[len(pairs):], strict=False):
            assert loaded.get("digests") == begun[source]["digests"], (source, target, loaded)
            assert close(went_on["losses"], whole[UNTIL:]), (source, target, went_on)
            assert len(loaded["changed"]) == (source[0] != target[0]) + (source[1] != target[1])


@pytest.mark.slow
def test_every_precision_goes_on_from_the_float32_weights_of_every_other(corpus, tmp_path):
    kinds = [(0, "bf16"), (1, "bf16"), (3, "fp16"), (0, "fp16"), (2, "fp32")]
    settings = [(f"train.precision={precision}", "deepspeed.overrides={fp16: {initial_scale_power: 4}}",
                 f"deepspeed.offload_optimizer={str(stage == 3).lower()}") for stage, precision in kinds]
    folders = [tmp_path / f"{stage}-{precision}" for stage, precision in kinds]
    beginnings = [case_of(corpus, folder, stage, UNTIL, *words, resume=False)
                  for folder, (stage, _), words in zip(folders, kinds, settings, strict=True)]
    more = [case_of(corpus, folder, stage, END, *words, resume=True)
            for folder, (stage, _), words in zip(folders, kinds, settings, strict=True)]
    whole = [case | {"folder": f"{case['folder']}-whole", "resume": False} for case in more]
    found = run_cases(tmp_path, [*beginnings, *more, *whole], ranks=1)
    begun, resumed, uninterrupted = found[:5], found[5:10], found[10:]
    for kind, one, other in zip(kinds, resumed, uninterrupted, strict=True):   # the same shape: to the bit
        assert one["losses"] == other["losses"][UNTIL:], kind
        assert one["digests"] == other["digests"], kind
        assert one["loss_scale"] == other["loss_scale"], kind
    pairs = [(source, target) for source, target in product(range(5), repeat=2)
             if FULL or target == (source + 1) % 5]
    cases = [case_of(corpus, folders[source], kinds[target][0], UNTIL, *settings[target], resume=True)
             for source, target in pairs]
    for (source, target), one in zip(pairs, run_cases(tmp_path, cases, ranks=2), strict=True):
        assert one.get("digests") == begun[source]["digests"], (kinds[source], kinds[target], one)


@pytest.mark.slow
def test_a_curve_begun_on_two_ranks_is_the_same_on_one_and_on_four(corpus, tmp_path):
    half, whole = tmp_path / "half", tmp_path / "whole"
    begun, uninterrupted = run_cases(tmp_path, [case_of(corpus, half, 2, 30, resume=False),
                                                case_of(corpus, whole, 2, 60, resume=False)], ranks=2)
    for ranks, stage in ((1, 3), (4, 1)):
        (found,) = run_cases(tmp_path, [case_of(corpus, half, stage, 60, resume=True)], ranks=ranks)
        assert close([*begun["losses"], *found["losses"]], uninterrupted["losses"]), (ranks, stage)


def resumed(corpus: Path, folder: Path, kinds: list[tuple[int, tuple[str, ...]]],
            ranks: int) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each (stage, settings): the uninterrupted run, and the one that was saved and resumed, on as many ranks."""
    folders = [folder / f"half-{ranks}-{number}" for number in range(len(kinds))]
    begun = [case_of(corpus, half, stage, UNTIL, *settings, resume=False)
             for half, (stage, settings) in zip(folders, kinds, strict=True)]
    whole = [case | {"folder": f"{case['folder']}-whole", "until": END} for case in begun]
    again = [case | {"until": END, "resume": True} for case in begun]
    found = run_cases(folder, [*begun, *whole, *again], ranks=ranks)
    return list(zip(found[len(kinds):2 * len(kinds)], found[2 * len(kinds):], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_offloaded_optimizers_and_parameters_go_on_to_the_bit(corpus, tmp_path, ranks):
    optimizer, parameters = "deepspeed.offload_optimizer=true", "deepspeed.offload_params=true"
    kinds = [(1, (optimizer,)), (2, (optimizer,)), (3, (optimizer,)), (3, (optimizer, parameters)), (3, (parameters,)),
             (3, (optimizer, parameters, "train.precision=bf16"))]
    for kind, (whole, again) in zip(kinds, resumed(corpus, tmp_path, kinds, ranks), strict=True):
        assert again["losses"] == whole["losses"][UNTIL:], kind
        assert again["digests"] == whole["digests"], kind


DOMAINS = ("data.batch_column=source", "model.n_batch_labels=2", "data.one_domain_batches=true",
           "model.domain_spec_batchnorm=dsbn", "optimizer.eps=1e-2")   # Adam makes whole steps of rounding else


@pytest.mark.slow
def test_the_statistics_of_batch_norms_come_back_and_are_the_same_on_any_ranks(tmp_path):
    """Two ranks are in different domains at a time; each domain's statistics are moved as one rank would move them."""
    corpus = runs.write_two_sources(tmp_path / "corpus")
    kinds = [(2, DOMAINS), (3, DOMAINS)]
    (alone, again), *others = [pair for ranks in (1, 2) for pair in resumed(corpus, tmp_path, kinds, ranks)]
    moves = {name: value for name, value in alone["statistics"].items() if name.endswith("num_batches_tracked")}
    assert sum(moves.values()) == 4 * END   # micro-batches
    assert all(moves.values())
    for whole, went_on in ((alone, again), *others):
        assert went_on["digests"] == whole["digests"]
        assert_alike(whole["statistics"], alone["statistics"])
    for ranks, source in ((1, "half-2-0"), (2, "half-1-0")):   # saved on the other number of ranks
        begun, found = run_cases(tmp_path, [case_of(corpus, tmp_path / source, 2, until, *DOMAINS, resume=True)
                                            for until in (UNTIL, END)], ranks=ranks)
        state = json.loads((tmp_path / source / f"step-{UNTIL:08d}" / "state.json").read_bytes())
        assert begun["digests"] == state["digests"]
        assert_alike(found["statistics"], alone["statistics"])


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Running means and variances to rounding; counts, alike."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("num_batches_tracked"):
            assert found[name] == value, name
        else:
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


@pytest.mark.slow
def test_moments_that_are_not_those_that_were_saved_are_found(corpus, tmp_path):
    """The files' checksums fit again: the digests alone must find it, in a stage that spreads parameters."""
    folder = tmp_path / "run"
    run_cases(tmp_path, [case_of(corpus, folder, 3, UNTIL, resume=False)], ranks=1)
    (file,) = folder.glob("step-*/*optim_states.pt")
    content = torch.load(file, weights_only=False)
    content["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg"][5] += 1e-6
    torch.save(content, file)
    runs.sign(file.parent)
    (found,) = run_cases(tmp_path, [case_of(corpus, folder, 1, UNTIL, resume=True)], ranks=1)
    assert "1 tensors are not those that were saved: encoder.embedding.weight" in found["error"]


def test_a_range_of_values_is_put_together_from_any_parts():
    whole = torch.arange(20.0)
    for cuts in ((20,), (7, 13), (1, 2, 3, 14), (10, 0, 10)):
        parts = list(whole.split(list(cuts)))
        for start, numel in product(range(20), range(21)):
            if start + numel <= 20:
                into = torch.full((numel,), -1.0)
                copy_range(parts, start, into)
                assert torch.equal(into, whole[start:start + numel])
