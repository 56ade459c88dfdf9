"""Opening a deployed detector from its folder, or from MLflow by a model's name."""

from collections.abc import Collection
from pathlib import Path

import torch

from diffguard.deploy.bundle import load_bundle
from diffguard.deploy.detector import DeployedDetector
from diffguard.errors import SettingError


def open_detector(
    uri: str | Path, device: torch.device | str | None = None, trust: Collection[str] = ()
) -> DeployedDetector:
    """Open the detector in a bundle's folder, or of a model in MLflow.

    Args:
        uri: a folder; or ``models:/name@alias``, ``models:/name/version`` or ``runs:/id/name``, read from the
            store that MLFLOW_TRACKING_URI names.
        device, trust: see `load_bundle`; for a model in MLflow, the code that it was logged with is trusted too.

    Raises:
        DataError: the bundle is missing, damaged, or names code that is not trusted; see `load_bundle`.
        SettingError: MLflow is not installed.
        ServiceError: MLflow does not answer, or has no such model.
    """
    if "://" not in str(uri) and not str(uri).startswith(("models:/", "runs:/")):
        return load_bundle(uri, device, trust=trust)
    try:
        from diffguard import mlflow
    except ImportError:
        raise SettingError(f"{uri}: MLflow is not installed; run: pip install 'diffguard-ood[mlflow]'") from None
    return mlflow.open_model(str(uri), device, trust)
