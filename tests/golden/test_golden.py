"""Every case of the golden vectors, in float64 and float32, and every public signature."""
import builtins
import inspect

import pytest
import torch

from tests.golden.cases import Case, api, index, resolve

CASES = index()


@pytest.mark.filterwarnings("ignore:batch_labels are missing")  # what model_generate_default_labels is about
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("spec", CASES, ids=[spec["name"] for spec in CASES])
def test_case_equals_upstream(spec, dtype):
    case = Case(spec, dtype)
    if "raises" in spec:
        with pytest.raises(getattr(builtins, spec["raises"])):
            case.call()
    else:
        assert case.check() == []


@pytest.mark.parametrize("name", sorted(api()))
def test_signature_begins_with_upstreams(name):
    module, _, attribute = name.removesuffix(".forward").rpartition(".")
    target = resolve(f"{module}:{attribute}")
    function = target.forward if name.endswith(".forward") else target
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    begun = [[p.name, p.kind.name, None if p.default is p.empty else _text(p.default)] for p in parameters]
    wanted = api()[name]
    assert begun[: len(wanted)] == wanted
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[len(wanted):])


def _text(default: object) -> str:
    return default.__name__ if isinstance(default, type) else repr(default)


def test_a_fault_is_seen():
    """The comparison itself can fail: a weight that is off by 1e-6 is caught in float64."""
    spec = next(spec for spec in CASES if spec["name"] == "model_flash_plain")
    case = Case(spec, torch.float64)
    case.tensors["w.decoder.fc.4.bias"] = case.tensors["w.decoder.fc.4.bias"] + 1e-6
    assert any("mlm_output" in fault for fault in case.check())
