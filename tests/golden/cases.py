"""Read the golden vectors; evaluate one case: build, call, differentiate, compare. Faults come back as sentences."""
import functools
import importlib
import json
import tarfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

ARCHIVE = Path(__file__).with_name("vectors.tar.xz")


@functools.cache
def files() -> dict[str, bytes]:
    """Name -> content of every file of the archive."""
    with tarfile.open(ARCHIVE) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive.getmembers()}


def index() -> list[dict[str, Any]]:
    return json.loads(files()["index.json"])


def api() -> dict[str, list[list[str | None]]]:
    return json.loads(files()["api.json"])


def resolve(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


class Case:
    """One case in one dtype."""

    def __init__(self, spec: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.spec = spec
        self.tolerance = spec["tol"][str(dtype).removeprefix("torch.")]
        self.dtype = getattr(torch, spec["dtype"]) if "dtype" in spec else dtype
        self.tensors = load(files()[f"{spec['name']}.safetensors"])
        self.inputs: dict[str, Tensor] = {}
        self.faults: list[str] = []

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in self.tensors.items() if name.startswith(prefix)}

    def module(self, target: str, init: Mapping[str, Any], prefix: str) -> nn.Module:
        built = resolve(target)(**init)
        if isinstance(built, nn.Module):
            weights = self.part(prefix)
            if weights or "raises" not in self.spec:
                assert set(built.state_dict()) == set(weights), "names of the state dict"
                built.load_state_dict(weights)
            built.to(self.dtype).train(self.spec["mode"] == "train")
        return built

    def argument(self, spec: Mapping[str, Any]) -> Any:
        (kind, content), *_ = spec.items()
        readers: dict[str, Callable[[], Any]] = {
            "value": lambda: content,
            "tensor": lambda: self.input(content),
            "numpy": lambda: self.cast(self.tensors[content].clone()).numpy(),
            "list": lambda: [self.argument(item) for item in content],
            "dict": lambda: {key: self.argument(item) for key, item in content.items()},
            "batch": lambda: types.SimpleNamespace(to=lambda device: None,
                                                   **{key: self.argument(item) for key, item in content.items()}),
            "state": lambda: {name: self.cast(x.clone()) for name, x in self.part(content).items()},
            "module": lambda: self.module(content, spec["init"], spec["weights"]),
        }
        return readers[kind]()

    def input(self, name: str) -> Tensor:
        if name not in self.inputs:
            self.inputs[name] = self.cast(self.tensors[name].clone()).requires_grad_(f"grad.{name}" in self.tensors)
        return self.inputs[name]

    def call(self) -> tuple[nn.Module | None, dict[str, Any]]:
        spec, module = self.spec, None
        function = resolve(spec["target"]) if spec["function"] else None
        if function is None:
            module = self.module(spec["target"], spec["init"], "w.")
            function = module if spec["method"] in ("forward", "__call__") else getattr(module, spec["method"])
        args = [self.argument(item) for item in spec["args"]]
        kwargs = {key: self.argument(item) for key, item in spec["kwargs"].items()}
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 the function under test draws from it
        out = function(*args, **kwargs)
        if isinstance(out, nn.Module):
            out = out.state_dict()
        return module, {"out": out} if isinstance(out, Tensor | np.ndarray) else dict(out)

    def check(self) -> list[str]:
        """Everything that differs from the vectors."""
        module, out = self.call()
        loss: Tensor | None = None
        for name in self.spec["outputs"]:
            got = torch.as_tensor(out[name])
            self.compare_output(name, got)
            if f"ct.{name}" in self.tensors and got.requires_grad:
                term = (got * self.cast(self.tensors[f"ct.{name}"])).sum()
                loss = term if loss is None else loss + term
        if self.part("ct."):
            assert loss is not None, "no output has a gradient"
            loss.backward()
            self.compare_gradients(module)
        for name in self.spec["state_after"]:
            self.compare(f"{name} afterwards", module.state_dict()[name], self.tensors[f"after.{name}"])
        return self.faults

    def compare_output(self, name: str, got: Tensor) -> None:
        if name in self.spec.get("uniform", []):
            self.compare_uniform(name, got, self.tensors[f"low.{name}"], self.tensors[f"high.{name}"])
            return
        want = self.tensors[f"out.{name}"]
        valid = torch.ones(want.shape, dtype=torch.bool)
        if name in self.spec["valid"]:
            padding = self.tensors["in." + self.spec["valid"][name]]
            valid = ~padding.reshape(*padding.shape, *(1,) * (want.dim() - padding.dim())).expand(want.shape)
        if name in self.spec.get("sampled", {}):
            self.compare_sample(name, got[valid], want[valid], self.tensors[f"out.{self.spec['sampled'][name]}"][valid])
        else:
            assert got.shape == want.shape, f"shape of {name}: {tuple(got.shape)} for {tuple(want.shape)}"
            self.compare(name, got[valid], want[valid])

    def compare(self, name: str, got: Tensor, want: Tensor, factor: float = 1.0) -> None:
        got, want = got.detach().double(), want.double()
        assert got.shape == want.shape, f"shape of {name}"
        error = ((got - want).abs() / want.abs().clamp(min=1.0)).nan_to_num(0.0)
        differs = (error > self.tolerance * factor) | (got.isnan() != want.isnan())
        if bool(differs.any()):
            self.faults.append(f"{name} is off by {float(error.max()):.3g}")

    def compare_gradients(self, module: nn.Module | None) -> None:
        parameters = dict(module.named_parameters()) if module is not None else {}
        for name, want in self.part("gradnorm.").items():
            grad = parameters[name].grad
            norm = torch.zeros(1) if grad is None else grad.double().norm().reshape(1)
            self.compare(f"gradient of {name}", norm, want, factor=20)
        for name, want in self.part("grad.").items():
            self.compare(f"gradient of {name}", self.inputs[name].grad, want, factor=20)

    def compare_sample(self, name: str, got: Tensor, prediction: Tensor, probability: Tensor) -> None:
        """Zero or the prediction, kept with its probability: two sums within six standard deviations."""
        kept, probability = (got.detach() != 0).double(), probability.double()
        self.compare(name, got, prediction * kept)
        for weight in (torch.ones_like(probability), probability - 0.5):
            sigma = (weight.square() * probability * (1 - probability)).sum().sqrt()
            if ((kept - probability) * weight).sum().abs() > 6 * sigma:
                self.faults.append(f"{name} is not drawn with the given probabilities")

    def compare_uniform(self, name: str, got: Tensor, low: Tensor, high: Tensor) -> None:
        """Whole numbers of each range, drawn evenly: the sum within six standard deviations."""
        got, low, high = got.double(), low.double(), high.double()
        sigma = (((high - low + 1).square() - 1) / 12).sum().sqrt()
        if bool(((got < low) | (got > high) | (got != got.round())).any()):
            self.faults.append(f"{name} leaves the range that ties allow")
        if (got - (low + high) / 2).sum().abs() > 6 * sigma:
            self.faults.append(f"{name} does not spread ties evenly")
