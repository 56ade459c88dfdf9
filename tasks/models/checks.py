"""Whether the models of a benchmark agree with it and with the variants, before anything runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffguard.detectors.baselines import check_baseline
from diffguard.engine import Request, check_request
from diffguard.errors import SettingError
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.folder import open_model as open_folder
from diffguard.models.folder import open_spec
from diffguard.settings import ACTIVATIONS, STANDARD_PATH, TrainedClassifier, TrainedDenoiser, Variant
from diffguard.training import untrained_classifier, untrained_denoiser
from tasks.common.files import fetched, read_images
from tasks.config.benchmark import DENOISER
from tasks.config.run import Run
from tasks.models.label_order import MOST_IMAGES as MOST_TO_CHECK
from tasks.models.label_order import check_order


def open_model(run: Run, folder: Path) -> Any:
    """The model of a folder that the stage train wrote.

    Raises:
        DataError: it is missing, or what it refers to has other weights by now.
    """
    return open_folder(fetched(folder), run.classes, run.benchmark.image.size, run.code)


def needs_labels(variant: Variant) -> bool:
    """Whether a variant evaluates the denoiser with labels."""
    return variant.guidance.kind in ("label", "all-labels") or variant.inversion_scale is not None


def check_models(run: Run) -> dict[str, Any]:
    """Open every model of a run and check that all agree with the benchmark, its variants and its baselines.

    A model still to be trained is opened untrained.

    Returns:
        The models by name, on the CPU.

    Raises:
        SettingError, DataError, ServiceError: a model does not agree or cannot be opened.
    """
    opened = {}
    for name in (DENOISER, *run.params.classifiers):
        opened[name] = _trained_or_new(run, name)
        check_fits(run, name, opened[name])
    for name in run.params.classifiers:
        for variant_name, variant in run.params.score.variants.items():
            try:
                check_request(Request(opened[name], settled(variant)), opened[DENOISER])
            except SettingError as error:
                raise SettingError(f"variant {variant_name}: {error}") from None
        image = run.benchmark.image
        for baseline_name, baseline in run.params.score.baselines.items():
            check_baseline(baseline_name, baseline, opened[name], (image.channels, image.size, image.size))
    return opened


def check_label_order(run: Run, name: str, classifier: Any, images: Tensor, labels: Sequence[int]) -> str:
    """Check that a classifier's labels are in the order of the benchmark's classes; one to be trained will be.

    Args:
        images: InD, [N, C, H, W] in [0, 1].
        labels: of these.

    Returns:
        A warning; "": there is none.

    Raises:
        DataError: they are not; see `tasks.models.label_order.check_order`.
    """
    is_trained = isinstance(run.benchmark.classifiers[name], TrainedClassifier)
    if not labels or (is_trained and not run.model(run.params.seeds[0], name).exists()):
        return ""
    predicted = predict_logits(classifier, images).argmax(dim=1).cpu().numpy()
    where = f"data/benchmarks/{run.benchmark.name}.yaml: classifier {name}"
    return check_order(where, run.classes, labels, predicted)


def some_ind_images(run: Run) -> tuple[Tensor, list[int]]:
    """InD images of a prepared benchmark's calibration split, at most `MOST_TO_CHECK`, with their labels."""
    rows = run.manifest[(run.manifest["role"] == "ind") & (run.manifest["split"] == "calibration")]
    rows = rows.sort_values("content_hash")[:MOST_TO_CHECK]
    return read_images(run.home, rows), rows["label"].tolist()


def _trained_or_new(run: Run, name: str) -> Any:
    folder = run.model(run.params.seeds[0], name)
    if folder.exists():
        return open_model(run, folder)
    spec = run.benchmark.denoiser if name == DENOISER else run.benchmark.classifiers[name]
    image = run.benchmark.image
    shape = (image.channels, image.size, image.size)
    if isinstance(spec, TrainedDenoiser):
        return untrained_denoiser(shape, len(run.classes), spec)
    if isinstance(spec, TrainedClassifier):
        return untrained_classifier(shape, len(run.classes), spec).eval().requires_grad_(False)
    return open_spec(spec, run.classes, image.size)


def settled(variant: Variant) -> Variant:
    """With what images would set replaced: a stop by the latest, a density by a standard Gaussian."""
    changes: dict[str, Any] = {"stop": variant.max_level} if variant.needs_calibration else {}
    if variant.needs_train:
        if variant.distance == ACTIVATIONS:
            standard = {"mean": (0.0,), "variance": (1.0,)}
            changes["activations"] = variant.activation_gaussian.model_copy(update=standard)
        else:
            changes["path"] = STANDARD_PATH
    return variant.model_copy(update=changes)


def check_fits(run: Run, name: str, model: Any) -> None:
    """Check that a model and a benchmark agree, before anything runs.

    Raises:
        SettingError: on labels, their order, channels or size; the message names the model and both values.
    """
    where, image = f"data/benchmarks/{run.benchmark.name}.yaml: {name}", run.benchmark.image
    channels = image.channels
    if name == DENOISER:
        takes, side, _ = model.image_shape
        if model.num_labels not in (0, len(run.classes)):
            raise SettingError(f"{where}: it knows {model.num_labels} labels, the benchmark has {len(run.classes)}")
        if takes != channels:
            raise SettingError(f"{where}: it takes images of {takes} channels; the benchmark's mode is {image.mode}")
        unsized = [name for name, variant in run.params.score.variants.items() if variant.process_method == "none"]
        if side != image.size and unsized:
            raise SettingError(
                f"{where}: it takes images of {side} pixels, the benchmark's have {image.size}; "
                f"set process_method to resize or pad (variant {unsized[0]} has none)"
            )
        return
    if model.num_classes < len(run.classes):
        raise SettingError(f"{where}: it has {model.num_classes} classes, the benchmark {len(run.classes)}")
    _check_order(where, run.classes, getattr(model, "class_names", None) or [])
    if model.num_classes > len(run.classes) and not isinstance(run.benchmark.denoiser, TrainedDenoiser):
        guided = [name for name, variant in run.params.score.variants.items() if needs_labels(variant)]
        if guided:
            raise SettingError(
                f"{where}: it has {model.num_classes} classes, the benchmark {len(run.classes)}; variant {guided[0]} "
                "asks the denoiser for a label of each: give all of them as classes, and the denoiser's labels"
            )
    if (takes := getattr(model, "in_channels", None)) not in (None, channels):
        raise SettingError(f"{where}: it takes images of {takes} channels; the benchmark's mode is {image.mode}")
    if (side := getattr(model, "input_size", None)) not in (None, image.size):
        raise SettingError(f"{where}: it takes images of {side} pixels; the benchmark's image.size is {image.size}")


def _check_order(where: str, classes: list[str], known: list[str]) -> None:
    """Raise a SettingError if a classifier knows a class of the benchmark by another label. Other names say nothing."""
    for label, (name, own) in enumerate(zip(classes, known, strict=False)):
        if name != own and name in known:
            raise SettingError(
                f"{where}: its label {known.index(name)} is {name!r}, the benchmark's {label}; "
                "give classes in the classifier's order"
            )
