"""Run as a program, in a process of its own: train the real scgpt package's model with its loss, print the losses.

    python stock_training.py SITE FOLDER: SITE is the folder that `pip install --target` filled; FOLDER holds
    settings.json, first.safetensors (weights) and batches.safetensors ("gene/0", "values/0", "targets/0", ...).
"""
import json
import sys
from pathlib import Path

from stock_scgpt import import_model


def main() -> None:
    site, folder = map(Path, sys.argv[1:])
    TransformerModel = import_model(site)
    import torch
    from safetensors.torch import load_file

    from scgpt.loss import masked_mse_loss

    torch.set_num_threads(1)
    settings, batches = json.loads((folder / "settings.json").read_text()), load_file(folder / "batches.safetensors")
    model = TransformerModel(**settings["model"], do_mvc=True, use_fast_transformer=False)
    model.load_state_dict({name.replace("self_attn.Wqkv.", "self_attn.in_proj_"): tensor for name, tensor
                           in load_file(folder / "first.safetensors").items()}, strict=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"], eps=settings["eps"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, settings["interval"], gamma=settings["factor"])
    losses = []
    for step in range(settings["steps"]):
        genes, values, targets = (batches[f"{name}/{step}"] for name in ("gene", "values", "targets"))
        model.train()
        output = model(genes, values, src_key_padding_mask=batches[f"padding/{step}"], MVC=True)
        masked = values.eq(-1)
        loss = masked_mse_loss(output["mlm_output"], targets, masked)
        loss = loss + masked_mse_loss(output["mvc_output"], targets, masked)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    print(json.dumps(losses))


if __name__ == "__main__":
    main()
