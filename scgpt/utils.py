"""Upstream's `scgpt.utils.load_pretrained`. For our own releases use the strict `scgpt.model.weights.load_state`."""
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")
_LOG = logging.getLogger("scgpt")


def load_pretrained(model: M, pretrained_params: "Mapping[str, Tensor]", strict: bool = False,  # noqa: FBT001, FBT002 upstream
                    prefix: str | Sequence[str] | None = None, verbose: bool = True) -> M:  # noqa: FBT001, FBT002 upstream
    """Put weights into `model` where name and shape fit; returns `model`.

    Args:
        model: changed in place.
        pretrained_params: name -> tensor, left unchanged. Names of attention weights are converted to the model's
            naming, in both directions (upstream: only from flash to torch names).
        strict: an unknown name or another shape raises RuntimeError; missing ones never do.
        prefix: take only names that start with it, or with one of them, after renaming.
        verbose: log what is loaded and what is left out.
    """
    from scgpt.model.weights import naming_of, rename

    target = model.state_dict()
    naming = naming_of(target)
    params = {rename(name, naming): tensor for name, tensor in pretrained_params.items()}
    if prefix:
        prefixes = (prefix,) if isinstance(prefix, str) else tuple(prefix)
        params = {name: tensor for name, tensor in params.items() if name.startswith(prefixes)}
    if not strict:
        left_out = [name for name, tensor in params.items()
                    if name not in target or target[name].shape != tensor.shape]
        params = {name: tensor for name, tensor in params.items() if name not in left_out}
        if verbose and left_out:
            _LOG.warning("left out, for their names or shapes: %s", ", ".join(left_out))
    if verbose:
        for name, tensor in params.items():
            _LOG.info("loading %s %s", name, tuple(tensor.shape))
    model.load_state_dict({**target, **params})
    return model
