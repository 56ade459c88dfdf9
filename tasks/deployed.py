"""Which detector is at work: the champion of MLflow's model registry, or the one that the project made."""

from diffguard.errors import DataError
from tasks import settings
from tasks.bundle import FOLDER
from tasks.log import open_tracking
from tasks.register import ALIAS, model_name


def default_detector() -> str:
    """The URI of the detector of params.yaml's benchmark: the registered champion, else data/<benchmark>/detector.

    The version that is champion now is named, so that what is said of it stays true when another takes its place.

    Raises:
        DataError: there is neither. ServiceError: MLflow does not answer.
    """
    from mlflow.exceptions import MlflowException

    benchmark = settings.load_params().benchmark
    name, client = model_name(benchmark), open_tracking()
    try:
        return f"models:/{name}/{client.get_model_version_by_alias(name, ALIAS).version}"
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    folder = settings.ROOT / "data" / benchmark / FOLDER
    if folder.is_dir():
        return str(folder)
    raise DataError(
        f"detector: there is neither models:/{name}@{ALIAS} nor {folder}; make one (make evaluate), or name another"
    )
