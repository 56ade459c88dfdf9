"""Weights of networks: read from files without running anything in them, and given to a network whole or not at all.

A network takes all of its tensors, no others, in their shapes, and finite. Prefixes that wrappers leave before names
(of torch.nn.DataParallel, torch.compile, Lightning and alike) are taken off where that makes them fit.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffguard.errors import DataError
from diffguard.utils.text import first_line

State = Mapping[str, Tensor]

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before the names of tensors."""

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where a training's checkpoint keeps the weights, averaged ones first (timm, torchvision, Lightning)."""

FREE_NUMBERS = 2**26
"""That a network may have whatever its weights hold, as of a head that is replaced: 256 MiB."""

_HARMLESS_EXTRA = ("n_averaged",)
"""What a wrapper that averages weights adds to them."""

_UNNEEDED = "num_batches_tracked"
"""A counter of training, which files of old versions of torch do not have."""


class _Named:
    """Stands in for a class that a checkpoint names, and whose contents nobody needs."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


_STAND_INS = [
    *(
        f"{package}.callbacks.{module}.ModelCheckpoint"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for module in ("model_checkpoint", "checkpoint")
    ),
    *(f"pathlib.{module}{kind}Path" for module in ("", "_local.") for kind in ("Posix", "Windows")),
]
"""Lightning's callback, which its checkpoints name, and the paths of other machines among options."""

_LFS = b"version https://git-lfs"


def _harmless() -> list[Any]:
    """What a training's checkpoint may hold beside tensors: options, counters and numbers. None of it does anything."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [np.dtype, *(type(np.dtype(kind)) for kind in ("float32", "float64", "int32", "int64", "bool"))]
    return [
        argparse.Namespace,
        Counter,
        OrderedDict,
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        *dtypes,
        *((_Named, name) for name in _STAND_INS),
    ]


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint: safetensors, or of torch.save, also within a training's checkpoint.

    Raises:
        DataError: it is missing or damaged, holds no state dict, or more than weights and options.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file of weights")
    _check_packed(path)
    state = _read(path)
    for key in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: it holds no state dict (tensors by name)")
    if wide := [key for key, value in state.items() if value.numel() * value.element_size() > _held(value)]:
        raise DataError(f"{path}: {wide[0]}: a tensor of {state[wide[0]].numel():,} numbers, of which it holds fewer")
    return dict(state)


def _held(tensor: Tensor) -> int:
    """Bytes that a tensor's file has for it: of a view of other tensors' all of theirs."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 2**63


def _check_packed(path: Path) -> None:
    """Raise a DataError if a file of torch.save, a zip archive that is not compressed, is larger once unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError):
        return  # safetensors, torch's older format, or damaged: reading says so
    except OSError as error:
        raise DataError(f"{path}: not a file of weights ({first_line(error)})") from None
    if unpacked > path.stat().st_size:
        raise DataError(f"{path}: not a file of weights (it unpacks to {unpacked:,} bytes; torch.save packs none)")


def check_memory(build: Callable[[], nn.Module], numbers: int, where: str) -> None:
    """See that a network does not ask for far more memory than its weights take; here it is made without any.

    Args:
        numbers: that its weights hold.

    Raises:
        DataError: it does.
    """
    try:
        with torch.device("meta"):
            asked = sum(value.numel() for value in build().state_dict().values())
    except RuntimeError as error:
        if "meta" in str(error):
            return  # it looks at its values while it is made
        raise
    if asked > max(4 * numbers, FREE_NUMBERS):
        raise DataError(f"{where}: its arguments ask for {asked:,} numbers, and its weights hold {numbers:,}")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever the two raise for a damaged file
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {named[1]}, and only weights and plain options are read; save its state dict alone"
        elif _begins_with(path, _LFS):
            reason = "a pointer of Git LFS; run: git lfs pull"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "damaged, or not written by torch.save"
        else:
            reason = first_line(error)
        raise DataError(f"{path}: not a file of weights ({reason})") from None


def _begins_with(path: Path, content: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(content)) == content


def read_folder(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The weights in a network's folder of Diffusers' layout, and the file that they are in.

    Raises:
        DataError: there are none, they are damaged, or the index of several files names one that is not in the folder.
    """
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights(folder / name), folder / name
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_parts(folder, index), index
    raise DataError(f"{folder}: no weights in it (diffusion_pytorch_model.safetensors is missing)")


def _read_parts(folder: Path, index: Path) -> dict[str, Tensor]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise DataError(f"{index}: not an index of weights ({first_line(error)})") from None
    state: dict[str, Tensor] = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise DataError(f"{index}: it names {name!r}, which is not a file of its folder")
        state |= read_weights(folder / name)
    return state


def fitting(state: State, fits: Callable[[State], int]) -> State:
    """The state dict under the names that fit best, with wrappers' prefixes taken off or not.

    Args:
        fits: how many of the names fit.
    """
    best, most = state, fits(state)
    for stripped in _stripped(state):
        if (count := fits(stripped)) > most:
            best, most = stripped, count
    return best


def _stripped(state: State) -> Iterator[State]:
    """The state dict without one prefix, without two, and so on; of one within the names too."""
    inner = {key.replace("._orig_mod.", ".").replace(".module.", "."): value for key, value in state.items()}
    for start in (state, inner) if len(inner) == len(state) else (state,):
        found = start
        yield found
        while True:
            prefix = next((each for each in PREFIXES if any(key.startswith(each) for key in found)), None)
            if prefix is None:
                break
            shorter = {key.removeprefix(prefix): value for key, value in found.items()}
            if len(shorter) < len(found):
                break  # a name is there with the prefix and without
            found = shorter
            yield found


def give_weights(network: nn.Module, state: State, source: str | Path, of: str) -> None:
    """Give a network its weights, all of them and no others, in float32 where it has that.

    Args:
        network: on a device with memory, or on ``meta``, whose tensors then become those of the state.
        source: the file, for messages. of: what the network is, for messages.

    Raises:
        DataError: some are missing, not of this network, of another shape, or not finite; one line with how many and
            the first ones.
    """
    wanted = network.state_dict()
    state = fitting(state, lambda names: len(wanted.keys() & names.keys()))
    check_weights(state, {key: value.shape for key, value in wanted.items()}, source, of)
    given = {
        key: value.to(wanted[key].dtype) if value.is_floating_point() else value
        for key, value in state.items()
        if key in wanted
    }
    is_empty = any(value.is_meta for value in wanted.values())
    network.load_state_dict(given, strict=False, assign=is_empty)


def check_weights(state: State, shapes: Mapping[str, Sequence[int]], source: str | Path, of: str) -> None:
    """See that a state dict holds what a network takes; see `give_weights`.

    Raises:
        DataError: it does not.
    """
    missing = [key for key in shapes if key not in state and not key.endswith(_UNNEEDED)]
    extra = [key for key in state if key not in shapes and key not in _HARMLESS_EXTRA]
    other = [key for key in shapes if key in state and tuple(state[key].shape) != tuple(shapes[key])]
    # Whole numbers in their place are quantized weights, which mean nothing without their scales.
    whole = [key for key in shapes if key in state and key not in other and _is_whole(key, state[key])]
    wrong = [
        f"{len(keys)} {what}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for what, keys in (
            (f"of {len(shapes)} are missing", missing),
            ("are not of this network", extra),
            ("have another shape", [f"{key} {_sides(state[key].shape)} for {_sides(shapes[key])}" for key in other]),
            ("are whole numbers", [f"{key} ({state[key].dtype})" for key in whole]),
        )
        if keys
    ]
    if wrong:
        raise DataError(f"{source}: the weights do not fit {of}: {'; '.join(wrong)}")
    check_finite(state, source)
    weights = [value for value in state.values() if value.is_floating_point() and not value.is_meta]
    if weights and not any(bool(value.any()) for value in weights):
        raise DataError(f"{source}: all of its weights are zero; a network of these knows nothing")


def _is_whole(key: str, value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and not key.endswith((_UNNEEDED, "position_ids"))


def check_finite(state: State, source: str | Path) -> None:
    """See that all numbers of a state dict are finite.

    Raises:
        DataError: one is not.
    """
    numbers = {key: value for key, value in state.items() if value.is_floating_point() and not value.is_meta}
    bad = [key for key, value in numbers.items() if not bool(value.isfinite().all())]
    if bad:
        more = f", and in {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise DataError(f"{source}: {bad[0]} holds numbers that are not finite{more}; the training that made it failed")


def _sides(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a number"
