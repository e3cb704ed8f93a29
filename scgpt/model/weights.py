"""Names and files of a release's tensors: flash <-> torch names, strict reading with a list of what does not fit.

`model.safetensors` is written tensor by tensor, so memory is bounded by the largest; `best_model.pt` is then saved from
the mapped file, and is always one: stock scGPT reads no other. Where a largest size is given, `model.safetensors` is
several files and the index that Hugging Face's readers know. Nothing here unpickles more than tensors.
"""
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from scgpt.errors import CheckpointError
from scgpt.files import publish, write_json

Naming = Literal["flash", "torch"]

# The part of a name that differs; weight and bias follow it. Newer upstream wrappers insert `_impl.`.
_FLASH, _TORCH, _WRAPPED = "self_attn.Wqkv.", "self_attn.in_proj_", "self_attn._impl."
_SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                       torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}
SAFETENSORS_FILE, PT_FILE = "model.safetensors", "best_model.pt"
INDEX_FILE = f"{SAFETENSORS_FILE}.index.json"   # instead of SAFETENSORS_FILE where the tensors are in several files
_FIX = "give model.safetensors or best_model.pt of an scGPT release"


def rename(name: str, naming: Naming) -> str:
    """`name` in the given naming, without `_impl.`; other names stay."""
    name = name.replace(_WRAPPED, "self_attn.")
    return name.replace(_TORCH, _FLASH) if naming == "flash" else name.replace(_FLASH, _TORCH)


def naming_of(names: Collection[str]) -> Naming:
    """The naming of a set of tensor names; "flash" where no attention is among them."""
    return "torch" if any(_TORCH in name for name in names) else "flash"


def weights_file(release: Path) -> Path:
    """The file of a release to read its tensors from: safetensors, their index, or else the only one that is there."""
    return next((release / name for name in (SAFETENSORS_FILE, INDEX_FILE) if (release / name).exists()),
                release / PT_FILE)


def weights_files(release: Path) -> list[Path]:
    """All files of a release that its tensors are read from: `weights_file`, with the files that an index lists."""
    file = weights_file(release)
    return [file, *(release / name for name in _files_of(file))] if file.suffix == ".json" else [file]


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` or `.pt` file, or of an index's files, mapped where the format allows.

    Names come without `module.`. Raises CheckpointError when the file is missing, torn, or holds anything but tensors.
    """
    fix = _FIX
    try:
        if path.suffix == ".json":
            state = {name: tensor for file in _files_of(path) for name, tensor in load_file(path.parent / file).items()}
        elif path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with warnings.catch_warnings():  # torch warns of foreign pickles before it refuses them
                warnings.simplefilter("ignore")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(f"the weights cannot be read: {error.strerror or error}", where=str(path),
                              fix=fix) from error
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"not a file of tensors: {reason}", where=str(path), fix=fix) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError("not a mapping of names to tensors", where=str(path), fix=fix)
    return {name.removeprefix("module."): value for name, value in state.items()}


def _files_of(index: Path) -> list[str]:
    """Names of the files that an index lists; they lie beside it."""
    try:
        files = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("not an index of tensors", where=str(index), fix=_FIX) from error
    if not all(isinstance(file, str) and Path(file).name == file for file in files):
        raise CheckpointError("the index names files outside its folder", where=str(index), fix=_FIX)
    return files


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, where: str,
               ignore: Collection[str] = ()) -> None:
    """Load tensors of either naming into `model`, every one and no other.

    Args:
        model: gets the tensors, in the dtype of its own; one on the meta device gets them as its parameters.
        state: name -> tensor.
        where: file or folder, for the message.
        ignore: prefixes of names in `state` that the model may lack, for example "flag_encoder.".

    Raises CheckpointError that lists what is missing, unexpected, or of another shape.
    """
    target = model.state_dict()
    naming = naming_of(target)
    renamed = {rename(name, naming): tensor for name, tensor in state.items()}
    given = {name: tensor for name, tensor in renamed.items()
             if name in target or not name.startswith(tuple(ignore))}
    faults = [f"{kind}: {_shortened(names)}" for kind, names in (
        ("missing", sorted(set(target) - set(given))), ("unexpected", sorted(set(given) - set(target))),
        ("of another shape", [f"{name} {tuple(given[name].shape)} for {tuple(tensor.shape)}" for name, tensor
                              in target.items() if name in given and given[name].shape != tensor.shape]),
    ) if names]
    if faults:
        raise CheckpointError(f"the weights do not fit the model ({'; '.join(faults)})", where=where,
                              fix="build the model from the args.json and vocab.json beside the weights")
    model.load_state_dict({name: tensor.to(target[name].dtype) for name, tensor in given.items()},
                          assign=any(tensor.is_meta for tensor in target.values()))


def _shortened(names: list[str], shown: int = 8) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def write_release_tensors(folder: Path, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor], *,
                          naming: Naming = "flash", dtype: torch.dtype | None = None,
                          max_file_bytes: int | None = None) -> None:
    """Write `model.safetensors` and `best_model.pt` into `folder`.

    Args:
        folder: must exist.
        shapes: name -> shape of every tensor, in the order to write.
        read: name -> tensor; called once a name, and its result dropped after it is written.
        naming: names in both files.
        dtype: of floating-point tensors in the files; None keeps theirs.
        max_file_bytes: of the tensors in one safetensors file; more become several files and an index. A tensor that
            is larger has a file of its own. None: one file.
    """
    parts = _parts(shapes, max_file_bytes, (dtype or torch.float32).itemsize)
    files = [SAFETENSORS_FILE] if len(parts) == 1 else [
        f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    for file, names in zip(files, parts, strict=True):
        with publish(folder / file) as temporary:
            write_safetensors(temporary, {name: shapes[name] for name in names}, read, naming=naming, dtype=dtype)
    if len(parts) > 1:
        _write_index(folder, dict(zip(files, parts, strict=True)), naming)
    state = {name: tensor for file in files for name, tensor in load_file(folder / file).items()}
    with publish(folder / PT_FILE) as temporary, temporary.open("wb") as stream:   # a path would put its name inside
        torch.save(state, stream)


def _parts(shapes: Mapping[str, torch.Size], max_bytes: int | None, itemsize: int) -> list[list[str]]:
    """The names of each file, in their order: a file is closed before it would be larger than `max_bytes`."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        n_bytes = shape.numel() * itemsize
        if parts[-1] and max_bytes is not None and size + n_bytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += n_bytes
    return parts


def _write_index(folder: Path, files: Mapping[str, list[str]], naming: Naming) -> None:
    total = sum(tensor.nbytes for file in files for tensor in load_file(folder / file).values())
    weight_map = {rename(name, naming): file for file, names in files.items() for name in names}
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_safetensors(path: Path, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor], *,
                      naming: Naming = "flash", dtype: torch.dtype | None = None) -> None:
    """A safetensors file, written front to back while tensors come and go. Arguments as `write_release_tensors`.

    The dtypes must be known before the data: the header is written last, into room left for it.
    """
    header: dict[str, dict[str, object]] = {"__metadata__": {"format": "pt"}}
    room = _header_room(shapes, naming)
    with path.open("wb") as stream:
        stream.seek(8 + room)
        end = 0
        for name, shape in shapes.items():
            tensor = read(name)
            if tensor.shape != shape:
                raise CheckpointError(f"tensor '{name}' has the shape {tuple(tensor.shape)}, not {tuple(shape)}",
                                      where=str(path), fix="export from a complete checkpoint")
            tensor = tensor.detach().cpu().contiguous()
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            data = tensor.flatten().view(torch.uint8).numpy()
            stream.write(data.data)
            header[rename(name, naming)] = {"dtype": _SAFETENSORS_DTYPES[tensor.dtype], "shape": list(shape),
                                            "data_offsets": [end, end + data.nbytes]}
            end += data.nbytes
        stream.seek(0)
        stream.write(room.to_bytes(8, "little"))
        stream.write(json.dumps(header, separators=(",", ":")).encode().ljust(room))


def _header_room(shapes: Mapping[str, torch.Size], naming: Naming) -> int:
    """Bytes that any header for these tensors fits into, a multiple of 8: offsets and dtypes at their longest."""
    longest = {rename(name, naming): {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**15, 10**15]}
               for name, shape in shapes.items()}
    header = {"__metadata__": {"format": "pt"}, **longest}
    return -(-len(json.dumps(header, separators=(",", ":")).encode()) // 8) * 8
