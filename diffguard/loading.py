"""Opening a deployed detector by its folder, or by a model's name in MLflow."""

from collections.abc import Collection
from pathlib import Path

import torch

from diffguard.deploy.bundle import load_bundle
from diffguard.deploy.detector import DeployedDetector
from diffguard.errors import SettingError


def open_detector(
    uri: str | Path, device: torch.device | str | None = None, trust: Collection[str] = ()
) -> DeployedDetector:
    """The detector of a bundle's folder, or of a model in MLflow.

    Args:
        uri: a folder; or ``models:/name@alias``, ``models:/name/version`` or ``runs:/id/name``, read from the
            store that MLFLOW_TRACKING_URI names.
        device, trust: see `load_bundle`; of a model in MLflow, what it was logged with is trusted too.

    Raises:
        DataError: see `load_bundle`. SettingError: MLflow is not installed.
        ServiceError: MLflow does not answer, or has no such model.
    """
    if "://" not in str(uri) and not str(uri).startswith(("models:/", "runs:/")):
        return load_bundle(uri, device, trust=trust)
    try:
        from diffguard import mlflow
    except ImportError:
        raise SettingError(f"{uri}: MLflow is not installed; run: pip install 'diffguard-ood[mlflow]'") from None
    return mlflow.open_model(str(uri), device, trust)
