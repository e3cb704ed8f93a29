"""A run that begins with the weights of another, or of a release."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.export import export
from pretrain.first_model import torch_seed
from pretrain.starting_point import EMBEDDING, copy_rows
from scgpt.data import TokenDataset
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from scgpt.rng import PURPOSE_WEIGHTS
from scgpt.vocab import GeneVocab
from tests.pretrain import runs
from tests.scgpt.data.cells import random_cells, write_corpus

SETTINGS = ("train.max_steps=2", "train.eval_every=2", "data.valid_split=null")


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begin") / "run"
    code, errors = runs.train(corpus, out, *SETTINGS)
    assert code == 0, errors
    return out


@pytest.fixture(scope="module")
def release(run: Path) -> Path:
    return export(run, run.with_name("release"))


@given(st.lists(st.integers(-1, 9), min_size=1, max_size=14), st.data())
def test_rows_are_taken_by_their_number_and_others_stay(rows, data):
    there = torch.arange(40.0).view(10, 4)
    parts = list(there.flatten().split(data.draw(st.integers(1, 40))))
    fresh = -torch.arange(1.0, 4 * len(rows) + 1)
    expected = torch.cat([there[row] if row >= 0 else fresh[4 * place:4 * place + 4] for place, row in enumerate(rows)])
    start = data.draw(st.integers(0, len(fresh) - 1))
    stop = data.draw(st.integers(start, len(fresh)))
    into = fresh[start:stop].clone()
    copy_rows(parts, np.array(rows), start, into, n_columns=4)
    assert torch.equal(into, expected[start:stop])


def grown_corpus(folder: Path, corpus: Path) -> tuple[Path, GeneVocab, GeneVocab]:
    """Cells with another vocabulary: ids moved, a gene gone, two that are new."""
    old = TokenDataset.open(corpus).vocab
    tokens = [f"NEW{i}" for i in range(2)] + [token for token in reversed(old.get_itos()) if token != old.get_itos()[3]]
    vocab = GeneVocab.from_dict({token: place for place, token in enumerate(tokens)}, default_token=None)
    write_corpus(folder, {"train": [random_cells([9] * 40)]}, vocab=vocab)
    return folder, old, vocab


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(3, 2), (1, 1)])
def test_a_grown_vocabulary_keeps_genes_by_name_and_draws_new_ones(run, release, corpus, tmp_path, stage, ranks):
    grown, old, new = grown_corpus(tmp_path / "grown", corpus)
    source = release if stage == 3 else run
    code, errors = runs.train(grown, tmp_path / "more", *SETTINGS, f"model.init_from={source}", "optimizer.lr=1e-30",
                              f"deepspeed.zero_stage={stage}", "model.generative=true", ranks=ranks)
    assert code == 0, errors
    before, after = runs.weights(run, "best"), runs.weights(tmp_path / "more")
    torch.manual_seed(torch_seed(0, 0, 0, PURPOSE_WEIGHTS))
    fresh = build_model(ModelConfig(n_layers=2, d_model=16, n_heads=2, d_hid=16, generative=True), new).state_dict()
    for token, row in new.items():
        expected = before[EMBEDDING][old[token]] if token in old else fresh[EMBEDDING][row]
        assert torch.allclose(after[EMBEDDING][row], expected, atol=1e-6), token
    assert torch.allclose(after["flag_encoder.weight"], fresh["flag_encoder.weight"], atol=1e-6)
    others = after.keys() - {EMBEDDING, "flag_encoder.weight"}
    assert all(torch.allclose(after[name], before[name], atol=1e-6) for name in others)
    told = runs.state_of(tmp_path / "more")["lineage"]
    assert (told["genes_kept"], told["genes_new"], told["genes_left"]) == (len(old) - 1, 2, 1)
    assert (told["drawn"], told["kind"]) == (["flag_encoder.weight"], "release" if source is release else "run")
    assert any(name.startswith("cls_decoder") for name in told["not_taken"])
    assert told["settings"] == {"generative": [False, True]}
    assert "begin_from" in runs.events(tmp_path / "more")
    child = export(tmp_path / "more", tmp_path / "child")
    assert told["text"] in (child / "README.md").read_text()
    assert not any(str(release.parent).encode() in file.read_bytes() for file in child.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "says"), [
    (("model.n_layers=3", "model.n_heads=4", "model.d_hid=8"),
     ("n_layers is 2 in the release and 3 in the model, n_heads is 2 in the release and 4 in the model, d_hid is 16 in "
      "the release and 8 in the model (RELEASE); set model.n_layers=2 model.n_heads=2 model.d_hid=16, or leave")),
    (("model.mvc_decoder_style=concat query",),
     "mvc_decoder.gene2query.weight is (16, 16) there and (64, 16) here")])
def test_a_model_that_the_weights_do_not_fit_is_refused_in_one_sentence(release, corpus, tmp_path, settings, says):
    code, errors = runs.train(corpus, tmp_path / "run", *SETTINGS, f"model.init_from={release}", *settings)
    assert code == 2
    assert says.replace("RELEASE", str(release)) in errors
    assert "transformer_encoder" not in errors   # where a setting says why
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize("what", ["nothing", "published", "changed"])
def test_what_is_no_starting_point_says_so(release, corpus, tmp_path, what):
    folder = tmp_path / "init"
    folder.mkdir()
    if what == "published":
        (folder / "args.json").write_text("{}")
    if what == "changed":
        for file in release.iterdir():
            (folder / file.name).write_bytes(file.read_bytes() + (b"x" if file.name == "best_model.pt" else b""))
    code, errors = runs.train(corpus, tmp_path / "run", *SETTINGS, f"model.init_from={folder}")
    assert code == 1
    says = {"nothing": "no starting point", "published": "scgpt import", "changed": "is not what SHA256SUMS says"}
    assert says[what] in errors
