"""DiffGuard: out-of-distribution detection by semantic mismatch with diffusion models.

The method of arXiv 2308.07687 (ICCV 2023) as a library on PyTorch and Diffusers. It asks of each
image whether it looks like what the classifier says it is: the image is inverted into a diffusion
model's noise, regenerated under the predicted label, and scored by how far the result is from it.

    from diffguard import DiffGuard, load_classifier, load_denoiser

Names are imported when they are asked for (PEP 562), so that a command that needs no torch does not wait for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffguard.version import METHOD_VERSION as METHOD_VERSION
from diffguard.version import __version__ as __version__

if TYPE_CHECKING:
    from diffguard.deploy.bundle import load_bundle as load_bundle
    from diffguard.detectors.diffguard import DiffGuard as DiffGuard
    from diffguard.engine import Engine as Engine
    from diffguard.errors import DataError as DataError
    from diffguard.errors import ServiceError as ServiceError
    from diffguard.errors import SettingError as SettingError
    from diffguard.images import read_image as read_image
    from diffguard.loading import open_detector as open_detector
    from diffguard.models.classifiers import Classifier as Classifier
    from diffguard.models.classifiers import ConvClassifier as ConvClassifier
    from diffguard.models.classifiers import NetworkClassifier as NetworkClassifier
    from diffguard.models.classifiers import ResidualClassifier as ResidualClassifier
    from diffguard.models.classifiers import load_classifier as load_classifier
    from diffguard.models.denoisers.base import Denoiser as Denoiser
    from diffguard.models.denoisers.loading import load_denoiser as load_denoiser
    from diffguard.settings import PRESETS as PRESETS
    from diffguard.settings import Variant as Variant

_WHERE = {
    "Classifier": "diffguard.models.classifiers",
    "ConvClassifier": "diffguard.models.classifiers",
    "DataError": "diffguard.errors",
    "Denoiser": "diffguard.models.denoisers.base",
    "DiffGuard": "diffguard.detectors.diffguard",
    "Engine": "diffguard.engine",
    "NetworkClassifier": "diffguard.models.classifiers",
    "PRESETS": "diffguard.settings",
    "ResidualClassifier": "diffguard.models.classifiers",
    "ServiceError": "diffguard.errors",
    "SettingError": "diffguard.errors",
    "Variant": "diffguard.settings",
    "load_bundle": "diffguard.deploy.bundle",
    "load_classifier": "diffguard.models.classifiers",
    "load_denoiser": "diffguard.models.denoisers.loading",
    "open_detector": "diffguard.loading",
    "read_image": "diffguard.images",
}

__all__ = ["METHOD_VERSION", "__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
