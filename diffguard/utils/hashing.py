"""Hashes that tell files, settings and weights apart."""

import hashlib
import inspect
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffguard.errors import DataError


def hash_file(path: Path) -> str:
    """SHA-256 of a file, or of a folder's relative names and contents, in hexadecimal."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    parts = {str(each.relative_to(path)): hash_file(each) for each in sorted(path.rglob("*")) if each.is_file()}
    return hash_values(parts)


def hash_values(values: Any) -> str:
    """SHA-256 of plain values, written one way only, in hexadecimal."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_code(name: str) -> str:
    """SHA-256 of the source behind ``package.module:name``: its module's, and that of the file where it is written.

    What these import is not looked at. Of DiffGuard's own code the hash is always the same: METHOD_VERSION tells.

    Raises:
        SettingError: it cannot be imported.
    """
    from diffguard.utils.importing import import_object

    module, made = name.partition(":")[0], import_object(name)
    if module.partition(".")[0] == "diffguard":
        return hash_values([])
    files = {getattr(sys.modules[module], "__file__", None)}
    with suppress(TypeError):  # it is an object without source, such as a partial function
        files.add(inspect.getsourcefile(made))
    return hash_values(sorted(hash_file(Path(file)) for file in files if file is not None))


def hash_weights(model: Any) -> str:
    """A hash of the weights of a classifier, or of a denoiser's networks."""
    import torch

    networks = {"": model} if isinstance(model, torch.nn.Module) else _networks(model)
    digests = {}
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            # As bytes, for the types that NumPy does not know.
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[f"{name}.{key}"] = hashlib.sha256(content).hexdigest()
    return hash_values(digests)


def _networks(denoiser: Any) -> dict[str, Any]:
    """A denoiser's networks, through what wraps it."""
    import torch

    inner = getattr(denoiser, "_denoiser", denoiser)
    return {name: each for name, each in vars(inner).items() if isinstance(each, torch.nn.Module)}
