"""Held against the real scgpt package, where SCGPT_STOCK names a folder with it."""
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.scgpt.model.both_sides import answers

SIZES = {"ntoken": 40, "d_model": 16, "nhead": 2, "d_hid": 24, "nlayers": 2, "vocab": {"<pad>": 3}, "dropout": 0.1,
         "pad_token": "<pad>", "pad_value": -2}
MODEL, GENERATOR = ("scgpt.model.model", "TransformerModel"), ("scgpt.model.generation_model", "TransformerGenerator")
N_QUESTIONS = 60
CASES = {
    "plain": (*MODEL, SIZES),
    "mvc": (*MODEL, SIZES | {"do_mvc": True}),
    "concat": (*MODEL, SIZES | {"do_mvc": True, "mvc_decoder_style": "concat query"}),
    "sum": (*MODEL, SIZES | {"do_mvc": True, "mvc_decoder_style": "sum query"}),
    "zeros": (*MODEL, SIZES | {"do_mvc": True, "explicit_zero_prob": True}),
    "classes": (*MODEL, SIZES | {"n_cls": 5, "nlayers_cls": 3}),
    "batches": (*MODEL, SIZES | {"do_mvc": True, "do_dab": True, "use_batch_labels": True, "num_batch_labels": 3,
                                 "domain_spec_batchnorm": True}),
    "category": (*MODEL, SIZES | {"input_emb_style": "category", "n_input_bins": 51}),
    "scaling": (*MODEL, SIZES | {"input_emb_style": "scaling", "cell_emb_style": "avg-pool"}),
    "generator": (*GENERATOR, SIZES | {"nlayers_cls": 3, "n_cls": 1, "pert_pad_id": 2, "use_fast_transformer": False}),
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    site = os.environ.get("SCGPT_STOCK")
    if site is None:
        pytest.skip("SCGPT_STOCK is not set: the folder of `pip install --no-deps --target FOLDER scgpt==0.2.4`")
    folder = tmp_path_factory.mktemp("stock")
    program, files = Path(__file__).with_name("stock_weights.py"), [folder / "weights", folder / "answers"]
    command = [sys.executable, str(program), site, str(files[0]), json.dumps(CASES), str(files[1]), str(N_QUESTIONS)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [load_file(file) for file in files]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_first_weights_are_the_public_package_s_to_the_bit(stock, name):
    module, model, arguments = CASES[name]
    torch.manual_seed(0)
    ours = getattr(import_module(module), model)(**arguments).state_dict()
    theirs = {key.partition("/")[2]: tensor for key, tensor in stock[0].items() if key.startswith(f"{name}/")}
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:batch_labels")
def test_random_models_and_batches_give_what_the_public_package_gives(stock):
    ours, theirs = answers(range(N_QUESTIONS)), stock[1]
    assert set(ours) == set(theirs)
    assert len(ours) > 50 * N_QUESTIONS
    for name, tensor in theirs.items():
        atol = 1e-9 if ours[name].dtype == torch.float64 else 1e-3
        torch.testing.assert_close(ours[name], tensor, rtol=atol, atol=atol, equal_nan=False,
                                   msg=lambda text, name=name: f"{name}: {text}")
