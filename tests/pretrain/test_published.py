"""A folder as others publish it becomes a release, or is refused with what does not fit."""
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import cli
from pretrain.export import verify
from pretrain.published import import_published
from pretrain.starting_point import EMBEDDING
from scgpt.errors import CheckpointError
from scgpt.files import json_bytes
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from scgpt.model.weights import rename
from scgpt.vocab import GeneVocab

SMALL = {"embsize": 16, "nheads": 2, "d_hid": 16, "nlayers": 2, "n_bins": 51, "max_seq_len": 32}


def published(folder: Path, vocab: GeneVocab, *, prefix: str = "", naming: str = "flash", padding: int = 0,
              args: dict[str, Any] | None = None, **settings: Any) -> dict[str, torch.Tensor]:
    """A folder as upstream's scripts leave it; its tensors under our names."""
    torch.manual_seed(5)
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_hid=16, **settings)
    state = build_model(config, vocab).state_dict()
    rows = torch.cat([state[EMBEDDING], torch.full((padding, 16), 9.0)])
    folder.mkdir()
    torch.save({prefix + rename(name, naming): tensor for name, tensor in (state | {EMBEDDING: rows}).items()},
               folder / "best_model.pt")
    (folder / "args.json").write_bytes(json_bytes(SMALL | (args or {})))
    return state


@pytest.mark.parametrize(("how", "settings"), [
    ({}, {}), ({"prefix": "module.", "naming": "torch", "padding": 5}, {}), ({"args": {"MVC": None}}, {"mvc": False}),
    ({}, {"generative": True}), ({}, {"kind": "generator", "n_input_bins": None}), ({"naming": "torch"}, {"n_cls": 4}),
    ({}, {"use_batch_labels": True, "n_batch_labels": 3, "domain_spec_batchnorm": "dsbn", "dab": True}),
    ({}, {"explicit_zero_prob": True, "dropout": 0.1})],
    ids=["plain", "prefixed", "no-mvc", "generative", "generator", "classes", "batches", "zero"])
def test_a_published_folder_becomes_a_release_whatever_it_is_called_and_leaves_out(tmp_path, how, settings):
    vocab = GeneVocab.from_dict({token: i for i, token in enumerate(["A", "B", "C", "D", "<pad>", "<cls>", "<eoc>"])})
    state = published(tmp_path / "public", vocab, **how, **settings)
    vocab.save_json(tmp_path / "public" / "vocab.json")
    facts = import_published(tmp_path / "public", tmp_path / "init")
    assert verify(tmp_path / "init")["largest_difference"] < 1e-6
    found = load_file(tmp_path / "init" / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert facts["rows_cut"] == how.get("padding", 0)
    config = ModelConfig.from_args(json.loads((tmp_path / "init" / "args.json").read_text()))
    assert {key: getattr(config, key) for key in settings if key != "dropout"} == {
        key: value for key, value in settings.items() if key != "dropout"}


def test_special_tokens_that_the_vocabulary_lacks_are_appended_as_upstream_does(tmp_path):
    whole = GeneVocab.from_dict({token: i for i, token in enumerate(["A", "B", "<pad>", "<cls>", "<eoc>"])})
    published(tmp_path / "public", whole)
    GeneVocab.from_dict({"A": 0, "B": 1}, default_token=None).save_json(tmp_path / "public" / "vocab.json")
    assert import_published(tmp_path / "public", tmp_path / "init")["tokens_added"] == ["<pad>", "<cls>", "<eoc>"]
    assert GeneVocab.from_file(tmp_path / "init" / "vocab.json").get_itos() == whole.get_itos()


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda state: state.pop("decoder.fc.0.bias"), r"missing: decoder\.fc\.0\.bias"),
    (lambda state: state.update(more=torch.zeros(2)), "unexpected: more"),
    (lambda state: state.update({"decoder.fc.0.bias": torch.zeros(3)}), r"another shape: decoder\.fc\.0\.bias \(3,\)"),
    (lambda state: state.update({EMBEDDING: torch.zeros(3, 16)}), "the vocabulary has 5 tokens, the embedding 3 rows"),
    (lambda state: state.update(more=Path("x")), "not a file of tensors")])
def test_tensors_that_do_not_fit_are_listed_and_nothing_is_left(tmp_path, spoil, says):
    vocab = GeneVocab.from_dict({token: i for i, token in enumerate(["A", "B", "<pad>", "<cls>", "<eoc>"])})
    state = published(tmp_path / "public", vocab)
    vocab.save_json(tmp_path / "public" / "vocab.json")
    spoil(state)
    torch.save(state, tmp_path / "public" / "best_model.pt")
    with pytest.raises(CheckpointError, match=says):
        import_published(tmp_path / "public", tmp_path / "init")
    assert [path.name for path in tmp_path.iterdir()] == ["public"]


def test_sizes_that_are_not_those_of_the_tensors_are_named_before_any_tensor(tmp_path):
    vocab = GeneVocab.from_dict({token: i for i, token in enumerate(["A", "B", "<pad>", "<cls>", "<eoc>"])})
    published(tmp_path / "public", vocab, args={"nlayers": 6, "d_hid": 64})
    vocab.save_json(tmp_path / "public" / "vocab.json")
    with pytest.raises(CheckpointError, match=r"args.json does not describe the weights: nlayers is 6 there and 2 in "
                                              r"the weights, d_hid is 64 there and 16 in the weights \("):
        import_published(tmp_path / "public", tmp_path / "init")


def test_the_command_says_how_to_begin_with_it_and_refuses_a_release(tmp_path, capsys):
    vocab = GeneVocab.from_dict({token: i for i, token in enumerate(["A", "B", "<pad>", "<cls>", "<eoc>"])})
    published(tmp_path / "public", vocab)
    vocab.save_json(tmp_path / "public" / "vocab.json")
    assert cli.main(["import", str(tmp_path / "public"), "--out", str(tmp_path / "init")]) == 0
    assert f"model.init_from={tmp_path / 'init'}" in capsys.readouterr().out
    assert cli.main(["import", str(tmp_path / "init"), "--out", str(tmp_path / "again")]) == 2
    assert "give it to model.init_from as it is" in capsys.readouterr().err
