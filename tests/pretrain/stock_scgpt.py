"""Run as a program, in a process of its own: load a release with the real scgpt package, print what it computes.

    python stock_scgpt.py SITE RELEASE INPUTS.safetensors: SITE is the folder that `pip install --target` filled.
"""
import json
import logging
import sys
import types
import warnings
from pathlib import Path


def import_model(site: Path) -> type:
    """TransformerModel of the package in `site`, without what its `__init__` imports: scanpy, scib and torchtext."""
    warnings.simplefilter("ignore")
    package = types.ModuleType("scgpt")
    package.__path__ = [str(site / "scgpt")]
    package.logger = logging.getLogger("scgpt")
    utils = types.ModuleType("scgpt.utils")
    utils.map_raw_id_to_vocab_id = None
    sys.modules |= {"scgpt": package, "scgpt.utils": utils}
    from scgpt.model import TransformerModel

    return TransformerModel


def main() -> None:
    site, release, inputs_path = map(Path, sys.argv[1:])
    TransformerModel = import_model(site)
    import torch
    from safetensors.torch import load_file

    args, vocab = json.loads((release / "args.json").read_text()), json.loads((release / "vocab.json").read_text())
    model = TransformerModel(
        ntoken=len(vocab), d_model=args["embsize"], nhead=args["nheads"], d_hid=args["d_hid"], nlayers=args["nlayers"],
        nlayers_cls=args["n_layers_cls"], n_cls=1, vocab=vocab, dropout=args["dropout"], pad_token=args["pad_token"],
        pad_value=args["pad_value"], do_mvc=True, use_fast_transformer=False)
    state = torch.load(release / "best_model.pt", map_location="cpu", weights_only=True)
    renamed = {name.replace("self_attn.Wqkv.", "self_attn.in_proj_"): tensor for name, tensor in state.items()}
    model.load_state_dict(renamed, strict=True)   # every key found, none left over
    model.eval()
    inputs = load_file(inputs_path)
    with torch.no_grad():
        output = model(inputs["gene"], inputs["values"], inputs["gene"] == vocab[args["pad_token"]], MVC=True)
    print(json.dumps({name: output[name].tolist() for name in ("mlm_output", "mvc_output", "cell_emb")}))


if __name__ == "__main__":
    main()
