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

SIZES = {"ntoken": 40, "d_model": 16, "nhead": 2, "d_hid": 24, "nlayers": 2, "vocab": {"<pad>": 3}, "dropout": 0.1,
         "pad_token": "<pad>", "pad_value": -2}
MODEL, GENERATOR = ("scgpt.model.model", "TransformerModel"), ("scgpt.model.generation_model", "TransformerGenerator")
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
    out = tmp_path_factory.mktemp("stock") / "weights.safetensors"
    program = Path(__file__).with_name("stock_weights.py")
    done = subprocess.run([sys.executable, str(program), site, str(out), json.dumps(CASES)], cwd=out.parent,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_first_weights_are_the_public_package_s_to_the_bit(stock, name):
    module, model, arguments = CASES[name]
    torch.manual_seed(0)
    ours = getattr(import_module(module), model)(**arguments).state_dict()
    theirs = {key.partition("/")[2]: tensor for key, tensor in stock.items() if key.startswith(f"{name}/")}
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
