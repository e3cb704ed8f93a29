"""Run as a program, in a process of its own: what the real scgpt package computes.

    python stock_weights.py SITE WEIGHTS.safetensors CASES ANSWERS.safetensors N: SITE is the folder that
    `pip install --target` filled; CASES is JSON, name -> [module, class, arguments]. WEIGHTS holds name/parameter,
    drawn after torch.manual_seed(0); ANSWERS those of `both_sides.answers(range(N))`.
"""
import json
import logging
import sys
import types
import warnings
from importlib import import_module
from pathlib import Path


def main() -> None:
    site, out, cases, answers_path, n_questions = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable()
    _shape_package(Path(site))
    import torch
    from safetensors.torch import save_file

    found = {}
    for name, (module, model, arguments) in json.loads(cases).items():
        torch.manual_seed(0)
        state = getattr(import_module(module), model)(**arguments).state_dict()
        found |= {f"{name}/{key}": tensor.clone() for key, tensor in state.items()}
    save_file(found, out)

    flash = _module("flash_attn.flash_attention", FlashMHA=_dense_flash_attention())
    sys.modules |= {"flash_attn": _module("flash_attn", flash_attention=flash), flash.__name__: flash}
    for name in ("scgpt.model.model", "scgpt.model.generation_model"):
        del sys.modules[name]   # it looked for flash-attn when it was imported
    from both_sides import answers

    save_file({name: tensor.contiguous() for name, tensor in answers(range(int(n_questions))).items()}, answers_path)


def _module(name: str, **contents: object) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__ = []
    vars(module).update(contents)
    return module


def _shape_package(site: Path) -> None:
    """Its __init__ files import scanpy, scib and torchtext; models, collator and tokenizing functions use none."""
    package = _module("scgpt", logger=logging.getLogger("scgpt"))
    package.__path__ = [str(site / "scgpt")]
    model, tokenizer = _module("scgpt.model"), _module("scgpt.tokenizer")
    model.__path__, tokenizer.__path__ = [str(site / "scgpt" / "model")], [str(site / "scgpt" / "tokenizer")]
    unused = {"_get_obs_rep": None, "_set_obs_rep": None}
    vocab = _module("torchtext.vocab", Vocab=type("Vocab", (), {}))
    others = [package, model, tokenizer, _module("scgpt.utils", map_raw_id_to_vocab_id=_ids_of),
              _module("scanpy"), _module("scanpy.get", **unused), _module("anndata", AnnData=None), vocab,
              _module("torchtext", vocab=vocab)]
    sys.modules |= {module.__name__: module for module in others}


def _ids_of(columns, gene_ids):
    """As the package's own function in a module that imports scib."""
    import torch

    return torch.from_numpy(gene_ids[columns.numpy()]).to(columns.dtype)


def _dense_flash_attention() -> type:
    """flash-attn 1's module without its kernel: exact attention, zeros at padding; its mask is True at tokens."""
    import torch
    from torch import nn

    class FlashMHA(nn.Module):
        def __init__(self, embed_dim, num_heads, *, batch_first, attention_dropout, device=None, dtype=None):
            super().__init__()
            self.num_heads, self.batch_first = num_heads, batch_first
            self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, device=device, dtype=dtype)
            self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

        def forward(self, x, key_padding_mask=None):
            is_token = torch.ones(x.shape[:2], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
            q, k, v = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            weights = logits.masked_fill(~is_token[:, None, None], -torch.inf).softmax(-1)
            context = (weights @ v).transpose(1, 2).flatten(-2) * is_token.unsqueeze(-1)
            return self.out_proj(context), None

    return FlashMHA


if __name__ == "__main__":
    main()
