"""Detectors: DiffGuard itself, those of pytorch-ood beside it, and several of them as one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffguard.detectors.complexity import HighFrequency as HighFrequency
    from diffguard.detectors.diffguard import DiffGuard as DiffGuard

_WHERE = {"DiffGuard": "diffguard.detectors.diffguard", "HighFrequency": "diffguard.detectors.complexity"}


def __getattr__(name: str) -> Any:  # pytorch_ood takes seconds to import
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
