"""The default detector: the champion of MLflow's model registry, or else the project's own bundle."""

from diffguard.errors import DataError
from tasks.bundle import FOLDER
from tasks.config import project
from tasks.config.params import load_params
from tasks.services.registry import ALIAS, model_name
from tasks.services.tracking import open_tracking


def default_detector() -> str:
    """The URI of the detector of params.yaml's benchmark: the registered champion, else data/<benchmark>/detector.

    The URI names the version, not the alias, so that reports stay true when another becomes champion.

    Raises:
        DataError: neither exists. ServiceError: MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    benchmark = load_params().benchmark
    name, client = model_name(benchmark), open_tracking()
    try:
        return f"models:/{name}/{client.get_model_version_by_alias(name, ALIAS).version}"
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    folder = project.ROOT / "data" / benchmark / FOLDER
    if folder.is_dir():
        return str(folder)
    raise DataError(
        f"detector: there is neither models:/{name}@{ALIAS} nor {folder}; make one (make evaluate), or name another"
    )
