"""Weights of networks: read from files without running code in them, and loaded completely or not at all.

A network is given all of its tensors and no others, in their shapes, and finite. Prefixes that wrappers add to names
(torch.nn.DataParallel, torch.compile, Lightning) are removed if the names then fit.
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
"""Prefixes that wrappers add to the names of tensors."""

NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Keys of a training checkpoint's weights, averaged ones first (timm, torchvision, Lightning)."""

FREE_NUMBERS = 2**26
"""Numbers (256 MiB in float32) that a network may have beyond its file's, as those of a head that is replaced."""

_HARMLESS_EXTRA = ("n_averaged",)
"""Tensors that a wrapper for averaging adds."""

_UNNEEDED = "num_batches_tracked"
"""A counter of training, which files of old versions of torch lack."""


class _Named:
    """Stands in for a class that a checkpoint names and whose contents are not needed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...


_STAND_INS = [
    *(
        f"{package}.callbacks.{module}.ModelCheckpoint"
        for package in ("pytorch_lightning", "lightning.pytorch")
        for module in ("model_checkpoint", "checkpoint")
    ),
    *(f"pathlib.{module}{kind}Path" for module in ("", "_local.") for kind in ("Posix", "Windows")),
]
"""Lightning's callback, which its checkpoints name, and paths among their options."""

_LFS = b"version https://git-lfs"


def _harmless() -> list[Any]:
    """What a training checkpoint may hold besides tensors: options, counters and numbers, none of which runs code."""
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
    """Read the state dict of a file: safetensors or torch.save, also nested in a training checkpoint (see `NESTED`).

    Raises:
        DataError: the file is missing or damaged, holds no state dict, or more than weights and plain options.
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
    if too_large := [
        key for key, value in state.items() if value.numel() * value.element_size() > _stored_bytes(value)
    ]:
        key = too_large[0]
        raise DataError(f"{path}: {key}: a tensor of {state[key].numel():,} numbers, of which it holds fewer")
    return dict(state)


def _stored_bytes(tensor: Tensor) -> int:
    """The bytes of a tensor's storage, which views share."""
    return tensor.untyped_storage().nbytes() if tensor.layout is torch.strided else 2**63


def _check_packed(path: Path) -> None:
    """Check that a file of torch.save, which is an uncompressed zip archive, is not larger once unpacked.

    Raises:
        DataError: it is, or it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError):
        return  # safetensors, torch's older format, or damaged, which reading reports
    except OSError as error:
        raise DataError(f"{path}: not a file of weights ({first_line(error)})") from None
    if unpacked > path.stat().st_size:
        raise DataError(f"{path}: not a file of weights (it unpacks to {unpacked:,} bytes; torch.save packs none)")


def check_memory(build: Callable[[], nn.Module], numbers: int, where: str) -> None:
    """Check that a network does not need far more memory than its weights; it is built without memory for that.

    Args:
        build: builds the network.
        numbers: count of the numbers in its weights.
        where: the file or option, for the message.

    Raises:
        DataError: the network has more than 4 times as many numbers, and more than `FREE_NUMBERS`.
    """
    try:
        with torch.device("meta"):
            needed = sum(value.numel() for value in build().state_dict().values())
    except RuntimeError as error:
        if "meta" in str(error):
            return  # it reads its values while it is built
        raise
    if needed > max(4 * numbers, FREE_NUMBERS):
        raise DataError(f"{where}: its arguments ask for {needed:,} numbers, and its weights hold {numbers:,}")


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise any kind of exception on damaged files
        if match := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {match[1]}, and only weights and plain options are read; save its state dict alone"
        elif _starts_with(path, _LFS):
            reason = "a pointer of Git LFS; run: git lfs pull"
        elif isinstance(error, pickle.UnpicklingError):
            reason = "damaged, or not written by torch.save"
        else:
            reason = first_line(error)
        raise DataError(f"{path}: not a file of weights ({reason})") from None


def _starts_with(path: Path, content: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(content)) == content


def read_folder(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Read the weights in a network's folder of Diffusers' layout; returns them and the file that holds or lists them.

    Raises:
        DataError: there are none, they are damaged, or the index of a sharded file names a file outside the folder.
    """
    for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
        if (folder / name).is_file():
            return read_weights(folder / name), folder / name
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index), index
    raise DataError(f"{folder}: no weights in it (diffusion_pytorch_model.safetensors is missing)")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
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
    """Return the state dict with the prefixes of wrappers removed or not, whichever fits best.

    Args:
        fits: counts the names of a state dict that fit.
    """
    best, most = state, fits(state)
    for stripped in _stripped(state):
        if (count := fits(stripped)) > most:
            best, most = stripped, count
    return best


def _stripped(state: State) -> Iterator[State]:
    """Yield the state dict without the first prefix, without the first two, and so on; also with inner ones removed."""
    inner = {key.replace("._orig_mod.", ".").replace(".module.", "."): value for key, value in state.items()}
    for start in (state, inner) if len(inner) == len(state) else (state,):
        stripped = start
        yield stripped
        while True:
            prefix = next((prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in stripped)), None)
            if prefix is None:
                break
            shorter = {key.removeprefix(prefix): value for key, value in stripped.items()}
            if len(shorter) < len(stripped):
                break  # two names differ in the prefix alone
            stripped = shorter
            yield stripped


def give_weights(network: nn.Module, state: State, source: str | Path, of: str) -> None:
    """Load weights into a network, all of them and no others, converted to the network's floating-point types.

    Args:
        network: on a device; or on ``meta``, in which case it takes over the tensors of the state.
        source: the file, for messages.
        of: what the network is, for messages.

    Raises:
        DataError: weights are missing, are not of this network, have another shape, or are not finite; one line
            with their number and the first names.
    """
    wanted = network.state_dict()
    state = fitting(state, lambda names: len(wanted.keys() & names.keys()))
    check_weights(state, {key: value.shape for key, value in wanted.items()}, source, of)
    weights = {
        key: value.to(wanted[key].dtype) if value.is_floating_point() else value
        for key, value in state.items()
        if key in wanted
    }
    is_empty = any(value.is_meta for value in wanted.values())
    network.load_state_dict(weights, strict=False, assign=is_empty)


def check_weights(state: State, shapes: Mapping[str, Sequence[int]], source: str | Path, of: str) -> None:
    """Check that a state dict fits a network; see `give_weights`.

    Args:
        shapes: shapes of the network's tensors, by name.

    Raises:
        DataError: it does not fit.
    """
    missing = [key for key in shapes if key not in state and not key.endswith(_UNNEEDED)]
    extra = [key for key in state if key not in shapes and key not in _HARMLESS_EXTRA]
    reshaped = [key for key in shapes if key in state and tuple(state[key].shape) != tuple(shapes[key])]
    # Integers are quantized weights, which are meaningless without their scales.
    integers = [key for key in shapes if key in state and key not in reshaped and _is_integer(key, state[key])]
    problems = [
        f"{len(keys)} {problem}: {', '.join(keys[:3])}{', …' if len(keys) > 3 else ''}"
        for problem, keys in (
            (f"of {len(shapes)} are missing", missing),
            ("are not of this network", extra),
            ("have another shape", [f"{key} {_sides(state[key].shape)} for {_sides(shapes[key])}" for key in reshaped]),
            ("are whole numbers", [f"{key} ({state[key].dtype})" for key in integers]),
        )
        if keys
    ]
    if problems:
        raise DataError(f"{source}: the weights do not fit {of}: {'; '.join(problems)}")
    check_finite(state, source)
    weights = [value for value in state.values() if value.is_floating_point() and not value.is_meta]
    if weights and not any(bool(value.any()) for value in weights):
        raise DataError(f"{source}: all of its weights are zero; a network of these knows nothing")


def _is_integer(key: str, value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex() and not key.endswith((_UNNEEDED, "position_ids"))


def check_finite(state: State, source: str | Path) -> None:
    """Check that all numbers of a state dict are finite.

    Raises:
        DataError: a number is NaN or infinite.
    """
    numbers = {key: value for key, value in state.items() if value.is_floating_point() and not value.is_meta}
    bad = [key for key, value in numbers.items() if not bool(value.isfinite().all())]
    if bad:
        more = f", and in {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise DataError(f"{source}: {bad[0]} holds numbers that are not finite{more}; the training that made it failed")


def _sides(shape: Sequence[int]) -> str:
    """A shape for messages, such as 3x64x64."""
    return "x".join(map(str, shape)) or "a number"
