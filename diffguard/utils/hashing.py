"""Hashes of files, settings and code."""

import hashlib
import inspect
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffguard.errors import DataError


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder's relative names and contents, in hexadecimal.

    Raises:
        DataError: there is no such file or folder.
    """
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    return hash_values({str(file.relative_to(path)): hash_file(file) for file in files})


def hash_values(values: Any) -> str:
    """Return the SHA-256 of plain values (what JSON holds) in canonical form, in hexadecimal."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_code(name: str) -> str:
    """Return the SHA-256 of the source of ``package.module:name``: of the module, and of the file that defines it.

    Code that these import is not included. For DiffGuard's own code the hash is constant: METHOD_VERSION stands for it.

    Raises:
        SettingError: the object cannot be imported.
    """
    from diffguard.utils.importing import import_object

    module, value = name.partition(":")[0], import_object(name)
    if module.partition(".")[0] == "diffguard":
        return hash_values([])
    files = {getattr(sys.modules[module], "__file__", None)}
    with suppress(TypeError):  # an object without source, such as a partial function
        files.add(inspect.getsourcefile(value))
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
