"""Run as a program, in a process of its own: the first weights of the real scgpt package's models.

    python stock_weights.py SITE OUT.safetensors CASES: SITE is the folder that `pip install --target` filled; CASES is
    JSON, name -> [module, class, arguments]. OUT holds name/parameter, drawn after torch.manual_seed(0).
"""
import json
import logging
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path


def main() -> None:
    site, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    warnings.simplefilter("ignore")
    package = types.ModuleType("scgpt")   # its __init__ imports scanpy, scib and torchtext; its models need none
    package.__path__ = [str(site / "scgpt")]
    package.logger = logging.getLogger("scgpt")
    utils = types.ModuleType("scgpt.utils")
    utils.map_raw_id_to_vocab_id = None
    sys.modules |= {"scgpt": package, "scgpt.utils": utils}
    import torch
    from safetensors.torch import save_file

    found = {}
    for name, (module, model, arguments) in cases.items():
        torch.manual_seed(0)
        state = getattr(import_module(module), model)(**arguments).state_dict()
        found |= {f"{name}/{key}": tensor.clone() for key, tensor in state.items()}
    save_file(found, out)


if __name__ == "__main__":
    main()
