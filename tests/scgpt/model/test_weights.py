"""Weights: names both ways, files that other readers read, strict loading that says what does not fit."""
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scgpt.errors import CheckpointError
from scgpt.model.build import build_model
from scgpt.model.config import ModelConfig
from scgpt.model.weights import (
    INDEX_FILE,
    PT_FILE,
    SAFETENSORS_FILE,
    load_state,
    naming_of,
    read_state,
    rename,
    weights_file,
    write_release_tensors,
)
from tests.scgpt.model.packs import VOCAB, cells

CONFIG = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_hid=12, dropout=0.0)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build_model(CONFIG, VOCAB)


def write(folder, state, **options):
    write_release_tensors(folder, {name: x.shape for name, x in state.items()}, state.__getitem__, **options)


@pytest.mark.parametrize("naming", ["flash", "torch"])
@pytest.mark.parametrize("file", [SAFETENSORS_FILE, PT_FILE])
@pytest.mark.parametrize("layers", ["flash", "torch"])
def test_every_naming_loads_into_every_model(tmp_path, model, naming, file, layers):
    write(tmp_path, model.state_dict(), naming=naming)
    state = read_state(tmp_path / file)
    assert naming_of(state) == naming
    other = build_model(CONFIG.model_copy(update={"layers": layers}), VOCAB, device="meta")
    load_state(other, state, where=file)
    packed = cells([5, 3], dtype=torch.float32)
    torch.testing.assert_close(other(packed)["mlm_output"], model(packed)["mlm_output"])


def test_files_are_what_stock_readers_read(tmp_path, model):
    state = model.state_dict() | {"counter": torch.tensor(7)}
    write(tmp_path, state)
    with safe_open(tmp_path / SAFETENSORS_FILE, "pt") as stock:
        assert stock.metadata() == {"format": "pt"}
        assert set(stock.keys()) == set(state)
    for other in (load_file(tmp_path / SAFETENSORS_FILE), torch.load(tmp_path / PT_FILE, weights_only=True)):
        assert all(torch.equal(other[name], x) and other[name].dtype == x.dtype for name, x in state.items())


def test_half_precision_release_keeps_integers(tmp_path, model):
    write(tmp_path, model.state_dict() | {"counter": torch.tensor(7)}, dtype=torch.bfloat16)
    state = read_state(tmp_path / SAFETENSORS_FILE)
    assert state["counter"].dtype == torch.int64
    assert state["decoder.fc.0.weight"].dtype == torch.bfloat16


def test_tensors_are_read_once_in_order_and_dropped(tmp_path, model):
    state, read = model.state_dict(), []
    write_release_tensors(tmp_path, {name: x.shape for name, x in state.items()},
                          lambda name: read.append(name) or state[name])
    assert read == list(state)


def test_a_tensor_of_another_shape_than_announced_leaves_no_file(tmp_path, model):
    state = model.state_dict()
    with pytest.raises(CheckpointError, match="decoder"):
        write_release_tensors(tmp_path, {"decoder.fc.0.bias": torch.Size([3])}, state.__getitem__)
    assert list(tmp_path.iterdir()) == []


def test_names_go_both_ways():
    names = {"flash": "transformer_encoder.layers.3.self_attn.Wqkv.bias",
             "torch": "transformer_encoder.layers.3.self_attn.in_proj_bias"}
    wrapped = "transformer_encoder.layers.3.self_attn._impl.Wqkv.bias"
    for naming, want in names.items():
        assert {rename(name, naming) for name in (*names.values(), wrapped)} == {want}
    assert rename("self_attn._impl.out_proj.bias", "torch") == "self_attn.out_proj.bias"
    assert naming_of(["decoder.fc.0.bias"]) == "flash"


def test_data_parallel_prefix_is_taken_off(tmp_path, model):
    torch.save({f"module.{name}": x for name, x in model.state_dict().items()}, tmp_path / "old.pt")
    loaded = build_model(CONFIG, VOCAB)
    load_state(loaded, read_state(tmp_path / "old.pt"), where="old.pt")
    state = loaded.state_dict()
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_what_does_not_fit_is_listed(model):
    state = model.state_dict()
    del state["decoder.fc.0.bias"]
    state |= {"extra.weight": torch.zeros(1), "decoder.fc.2.bias": torch.zeros(3)}
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state, where="best_model.pt")
    text = str(caught.value)
    assert all(part in text for part in ("missing: decoder.fc.0.bias", "unexpected: extra.weight",
                                         "decoder.fc.2.bias (3,) for (16,)", "best_model.pt"))


def test_ignored_names_may_be_absent_from_the_model(model):
    state = model.state_dict() | {"flag_encoder.weight": torch.zeros(2, 16)}
    load_state(model, state, where="here", ignore=["flag_encoder."])
    with pytest.raises(CheckpointError, match="flag_encoder"):
        load_state(model, state, where="here")


class Malice:
    def __reduce__(self):
        return print, ("run while reading",)


@pytest.mark.parametrize("content", ["missing", "text", "pickle", "list", "torn.pt", "torn.safetensors"])
def test_a_file_that_is_not_weights_is_refused_and_nothing_is_run(tmp_path, capsys, content):
    path = tmp_path / ("model.safetensors" if content.endswith("safetensors") else "best_model.pt")
    if content == "text":
        path.write_text("not weights")
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Malice()))
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    elif content == "torn.pt":
        torch.save({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:900])
    elif content == "torn.safetensors":
        save_file({"a": torch.zeros(1000)}, path)
        path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(CheckpointError, match=path.name):
        read_state(path)
    assert capsys.readouterr().out == ""


def test_a_largest_size_gives_several_files_and_the_index_of_hugging_face(tmp_path, model):
    state = model.state_dict()
    largest = max(tensor.nbytes for tensor in state.values())
    write(tmp_path, state, max_file_bytes=2 * largest)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / INDEX_FILE).read_bytes())
    assert len(files) > 1
    assert [file.name for file in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors"
                                             for i in range(1, len(files) + 1)]
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 2 * largest for file in files)
    assert weights_file(tmp_path) == tmp_path / INDEX_FILE
    for found in (read_state(tmp_path / INDEX_FILE), read_state(tmp_path / PT_FILE)):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_tensor_that_is_larger_than_a_file_may_be_has_one_of_its_own(tmp_path, model):
    write(tmp_path, model.state_dict(), max_file_bytes=1)
    assert len(list(tmp_path.glob("model-*.safetensors"))) == len(model.state_dict())


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": 3}'])
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / INDEX_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="index"):
        read_state(tmp_path / INDEX_FILE)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_keeps_its_own_dtype(tmp_path, model, device):
    write(tmp_path, model.state_dict(), dtype=torch.float16)
    other = build_model(CONFIG, VOCAB, device=device)
    load_state(other, read_state(tmp_path / SAFETENSORS_FILE), where="here")
    assert {tensor.dtype for tensor in other.parameters()} == {torch.float32}
