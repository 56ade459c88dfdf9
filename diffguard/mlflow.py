"""A model flavor of MLflow: detector bundles, saved, logged, loaded and served by MLflow's conventions.

    import diffguard.mlflow
    diffguard.mlflow.log_model("data/digits/detector", name="detector", registered_model_name="diffguard-digits")
    detector = diffguard.mlflow.load_model("models:/diffguard-digits@champion")
    mlflow.pyfunc.load_model("models:/diffguard-digits@champion").predict(pd.DataFrame({"image": [base64_of_a_png]}))

A model's folder holds the bundle in ``detector/`` and this library in ``code/``; its MLmodel file holds the bundle's
hash. As a Python function it takes a column ``image`` (base64 of PNG or JPEG files) and returns a row for each image:
label, class_name, confidence, score, p_value, is_ood, and, with the parameter ``reconstruction``, the reconstruction as
base64 of a PNG file (null if the diffusion model was not evaluated).
"""

import os
import shutil
import sys
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from diffguard.utils.threads import set_wait_policy

set_wait_policy()  # before torch is imported, if this is what a server of MLflow imports first

import pandas as pd
import torch
import yaml
from mlflow import MlflowClient, get_registry_uri, get_tracking_uri, pyfunc
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.models.utils import _save_example
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _CONSTRAINTS_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _mlflow_conda_env,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from mlflow.utils.file_utils import get_total_file_size
from mlflow.utils.model_utils import (
    _add_code_from_conf_to_system_path,
    _copy_extra_files,
    _get_flavor_configuration,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image

from diffguard.deploy.bundle import EXAMPLE_FILE, check_code, hash_bundle, load_bundle, save_bundle
from diffguard.deploy.detector import DeployedDetector
from diffguard.errors import DataError, DiffGuardError, NotFiniteError, ServiceError
from diffguard.images import to_picture
from diffguard.models.folder import read_reference
from diffguard.serving.limits import Limits
from diffguard.serving.requests import decode_images, encode_image
from diffguard.utils.importing import check_trust
from diffguard.utils.text import first_line
from diffguard.version import METHOD_VERSION, __version__

FLAVOR_NAME = "diffguard"
DETECTOR_FOLDER, CODE_FOLDER = "detector", "code"
DISTRIBUTION = "diffguard-ood"
"""Name of this library's distribution; the package is diffguard."""

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("string", "image")]),
    outputs=Schema(
        [
            ColSpec("long", "label"),
            ColSpec("string", "class_name"),
            ColSpec("double", "confidence"),
            ColSpec("double", "score"),
            ColSpec("double", "p_value"),
            ColSpec("boolean", "is_ood"),
            ColSpec("string", "reconstruction", required=False),
        ]
    ),
    params=ParamSchema([ParamSpec("reconstruction", "boolean", False)]),
)
"""Inputs, outputs and parameters of every model of this flavor."""


def get_default_pip_requirements() -> list[str]:
    """Pin the libraries that DiffGuard requires to the installed versions; the model contains DiffGuard itself."""
    pinned = []
    try:
        requirements = [Requirement(line) for line in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:  # not installed, but run from its source
        requirements = []
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            # Without a local label, as in 2.6.0+cpu, which no public registry has.
            pinned.append(f"{requirement.name}=={Version(version(requirement.name)).public}")
    return pinned


def _copy_library(folder: Path) -> None:
    """Copy this library into a model's code folder, from which MLflow imports it.

    It is not a requirement by name: an index may not have it, or have another version, with other scores.
    """
    package = Path(__file__).parent
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))


def _classifier_requirements(bundle: Path) -> list[str]:
    """Pin the library that a bundle's classifier comes from to the installed version."""
    is_timm = getattr(read_reference(bundle / "classifier"), "kind", None) == "timm"
    return [f"timm=={version('timm')}"] if is_timm else []


def get_default_conda_env() -> Any:
    """Return a Conda environment with `get_default_pip_requirements`."""
    return _mlflow_conda_env(additional_pip_deps=get_default_pip_requirements())


def save_model(
    detector: DeployedDetector | str | Path,
    path: str | Path,
    conda_env: Any = None,
    code_paths: list[str] | None = None,
    mlflow_model: Model | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = None,
    pip_requirements: list[str] | str | None = None,
    extra_pip_requirements: list[str] | str | None = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
    trust: Collection[str] = (),
    **_: Any,
) -> None:
    """Save a detector as an MLflow model on the local file system.

    Args:
        detector: a detector, or the folder of a bundle.
        path: a folder that does not exist yet.
        signature: None: `SIGNATURE`.
        input_example: None: the example image of the bundle.
        pip_requirements: None: `get_default_pip_requirements`.
        conda_env, code_paths, mlflow_model, extra_pip_requirements, metadata, extra_files: as in every flavor
            of MLflow.
        trust: custom code that the bundle may import (see `load_bundle`). It is recorded in the MLmodel file, and
            trusted by everyone who loads the model from its store.

    Raises:
        DataError: the folder is not a complete bundle of this version, or names code that is not trusted.
        SettingError: an entry of trust is not a name of code.
    """
    check_trust(trust)
    _validate_env_arguments(conda_env, pip_requirements, extra_pip_requirements)
    path = Path(path).absolute()
    _validate_and_prepare_target_save_path(str(path))
    _validate_and_copy_code_paths(code_paths, str(path), CODE_FOLDER)
    _copy_library(path / CODE_FOLDER)
    folder = path / DETECTOR_FOLDER
    if isinstance(detector, DeployedDetector):
        save_bundle(detector, folder)
        check_code(folder, trust)
    else:
        check_code(detector, trust)
        shutil.copytree(detector, folder)

    model = Model() if mlflow_model is None else mlflow_model
    model.signature = signature or SIGNATURE
    if input_example is None:
        with Image.open(folder / EXAMPLE_FILE) as picture:
            input_example = pd.DataFrame({"image": [encode_image(picture)]})
    _save_example(model, input_example, str(path))
    if metadata is not None:
        model.metadata = metadata
    pyfunc.add_to_model(
        model,
        loader_module="diffguard.mlflow",
        data=DETECTOR_FOLDER,
        conda_env=_CONDA_ENV_FILE_NAME,
        python_env=_PYTHON_ENV_FILE_NAME,
        code=CODE_FOLDER,
    )
    extra = _copy_extra_files(extra_files, str(path))
    made_by = {"diffguard_version": __version__, "method_version": METHOD_VERSION, "bundle_hash": hash_bundle(folder)}
    model.add_flavor(FLAVOR_NAME, data=DETECTOR_FOLDER, code=CODE_FOLDER, trust=sorted(trust), **made_by, **extra)
    if size := get_total_file_size(str(path)):
        model.model_size_bytes = size
    model.save(str(path / MLMODEL_FILE_NAME))
    if conda_env is None and pip_requirements is None:
        pip_requirements = [*get_default_pip_requirements(), *_classifier_requirements(folder)]
    _write_environment(path, conda_env, pip_requirements, extra_pip_requirements)


def _write_environment(path: Path, conda_env: Any, pip_requirements: Any, extra_pip_requirements: Any) -> None:
    if conda_env is None:
        # MLflow would infer them from what is imported in this process, which is not what the model needs.
        default = get_default_pip_requirements() if pip_requirements is None else None
        environment = _process_pip_requirements(default, pip_requirements, extra_pip_requirements)
    else:
        environment = _process_conda_env(conda_env)
    conda, requirements, constraints = environment
    (path / _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(conda, default_flow_style=False), encoding="utf-8")
    if constraints:
        (path / _CONSTRAINTS_FILE_NAME).write_text("\n".join(constraints), encoding="utf-8")
    (path / _REQUIREMENTS_FILE_NAME).write_text("\n".join(requirements), encoding="utf-8")
    _PythonEnv.current().to_yaml(str(path / _PYTHON_ENV_FILE_NAME))


def log_model(
    detector: DeployedDetector | str | Path,
    name: str = DETECTOR_FOLDER,
    registered_model_name: str | None = None,
    **options: Any,
) -> ModelInfo:
    """Log a detector as a model of the active run, or of the run ``run_id``; register it if a name is given.

    Args:
        detector: a detector, or the folder of a bundle.
        options: of `save_model`, and of `mlflow.models.Model.log`: params, tags, model_type, step, run_id,
            await_registration_for, …
    """
    if (run_id := options.get("run_id")) is not None and options.get("model_id") is None:
        # MLflow would create it in the active experiment, which may not be the run's.
        client = MlflowClient()
        run = client.get_run(run_id)
        labels = {key: options.pop(key, None) for key in ("tags", "model_type")}
        params = {key: str(value) for key, value in (options.pop("params", None) or {}).items()} | run.data.params
        model = client.create_logged_model(run.info.experiment_id, name, run_id, params=params, **labels)
        options["model_id"] = model.model_id
    return Model.log(
        artifact_path=None,
        name=name,
        flavor=sys.modules[__name__],
        registered_model_name=registered_model_name,
        detector=detector,
        **options,
    )


def load_model(
    model_uri: str,
    dst_path: str | None = None,
    device: torch.device | str | None = None,
    trust: Collection[str] = (),
) -> DeployedDetector:
    """Load the detector of a model.

    Args:
        model_uri: ``models:/name@alias``, ``models:/name/version``, ``runs:/id/name``, or a folder.
        dst_path: folder for its files; None: a temporary folder.
        device: see `diffguard.deploy.bundle.load_bundle`.
        trust: custom code that the bundle may import. Code that the model was logged with is trusted too, unless
            model_uri is a folder, which anybody may have written.

    Raises:
        DataError: the bundle is damaged, or names code that is not trusted.
        mlflow.exceptions.MlflowException: there is no such model.
    """
    is_from_store = model_uri.startswith(("models:/", "runs:/"))
    local = Path(_download_artifact_from_uri(artifact_uri=model_uri, output_path=dst_path))
    return _load(local, device, trust, is_from_store=is_from_store)


def _load(
    folder: Path, device: torch.device | str | None, trust: Collection[str], *, is_from_store: bool
) -> DeployedDetector:
    flavor = _get_flavor_configuration(model_path=str(folder), flavor_name=FLAVOR_NAME)
    trusted = {*trust, *(flavor.get("trust") or ())} if is_from_store else set(trust)
    check_trust(trusted)
    if trusted:  # otherwise its code must not be importable
        _add_code_from_conf_to_system_path(str(folder), flavor)
    return load_bundle(folder / DETECTOR_FOLDER, device, bundle_hash=flavor.get("bundle_hash"), trust=trusted)


def open_model(
    model_uri: str, device: torch.device | str | None = None, trust: Collection[str] = ()
) -> DeployedDetector:
    """`load_model`, with MLflow's failures as errors in one line.

    Raises:
        ServiceError: MLflow does not answer, or has no such model. DataError: the bundle is damaged.
    """
    _check_store(model_uri)
    # An unreachable store fails in seconds, not minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    try:
        return load_model(model_uri, device=device, trust=trust)
    except DiffGuardError:
        raise
    except Exception as error:  # any kind, as the store's driver raises it
        reason = first_line(error)
        raise ServiceError(
            f"{model_uri}: MLflow cannot load it ({reason}); check that MLFLOW_TRACKING_URI names the store that has it"
        ) from None


def _check_store(model_uri: str) -> None:
    """Check that a database file exists: MLflow would create a missing one.

    Raises:
        ServiceError: it does not exist.
    """
    uri = get_registry_uri() if model_uri.startswith("models:/") else get_tracking_uri()
    scheme, _, location = uri.partition("://")
    path = Path(location.removeprefix("/")) if scheme == "sqlite" else None
    if path is not None and not path.exists():
        unset = "" if os.environ.get("MLFLOW_TRACKING_URI") else "; MLFLOW_TRACKING_URI is not set"
        raise ServiceError(f"{model_uri}: there is no store {path.absolute()}{unset}; name the store that has it")


def _load_pyfunc(path: str) -> "_Function":
    # MLflow has made the model's code importable already, and passes no options of whoever loads it.
    return _Function(_load(Path(path).parent, None, (), is_from_store=True))


class _Function:
    """A detector as a Python function of MLflow: a table of images in, a table of decisions out."""

    def __init__(self, detector: DeployedDetector) -> None:
        self.detector, self.limits = detector, Limits()

    def get_raw_model(self) -> DeployedDetector:
        return self.detector

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Decide on images; see the module.

        Raises:
            MlflowException: INVALID_PARAMETER_VALUE if an image cannot be used or there are too many; an internal
                error if a score is not finite.
        """
        reconstructions = bool((params or {}).get("reconstruction", False))
        try:
            if "image" not in model_input:
                raise DataError("images: the column image is missing; it holds base64 of PNG or JPEG files")
            pictures = decode_images(model_input["image"].tolist(), self.limits)
            images = [self.detector.prepare(picture, f"images[{index}]") for index, picture in enumerate(pictures)]
            decisions = self.detector.decide(torch.stack(images), reconstructions=reconstructions)
        except NotFiniteError as error:
            raise MlflowException(str(error)) from None  # not a fault of the request
        except DataError as error:
            raise MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE) from None
        columns = ("label", "class_name", "confidence", "score", "p_value", "is_ood")
        table = pd.DataFrame({column: [getattr(decision, column) for decision in decisions] for column in columns})
        if reconstructions:
            shown = [decision.reconstruction for decision in decisions]
            encoded = [None if image is None else encode_image(to_picture(image)) for image in shown]
            # dtype object, since a column of strings would turn None into NaN, which JSON does not have.
            table["reconstruction"] = pd.Series(encoded, dtype=object)
        return table
