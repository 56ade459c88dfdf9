"""A benchmark on this machine: its places, and the names of its labels."""

from typing import Any

from diffguard.errors import SettingError
from tasks.config import project
from tasks.config.benchmark import Benchmark, Dataset, Part
from tasks.sources.readers import class_names
from tasks.sources.settings import place_of, resolve


def resolved(benchmark: Benchmark, root: str | None) -> Benchmark:
    """The benchmark with {root} and relative places in its sources replaced.

    Raises:
        SettingError: a place says {root}, and none is given.
    """

    def of(datasets: dict[str, Dataset]) -> dict[str, Dataset]:
        return {
            name: Dataset(
                parts=tuple(Part(source=resolve(p.source, root, project.ROOT), splits=p.splits) for p in dataset.parts)
            )
            for name, dataset in datasets.items()
        }

    return benchmark.model_copy(
        update={
            "ind": of(benchmark.ind),
            "near": of(benchmark.near),
            "far": of(benchmark.far),
            "classifiers": {name: _model_resolved(spec, root) for name, spec in benchmark.classifiers.items()},
            "denoiser": _model_resolved(benchmark.denoiser, root),
        }
    )


def _model_resolved(spec: Any, root: str | None) -> Any:
    """A model's spec with the places in it replaced; an id of a hub stays as it is."""
    places = {}
    for key in ("path", "weights"):
        text = getattr(spec, key, None)
        if text is None:
            continue
        full = project.ROOT / place_of(text, root)
        is_id = key == "path" and not text.startswith((".", "/", "{")) and not full.exists()
        places[key] = text if is_id else str(full)
    return spec.model_copy(update=places)


def label_names(benchmark: Benchmark) -> list[str]:
    """The names of a benchmark's labels, in their order.

    Raises:
        SettingError: they are given nowhere.
    """
    if isinstance(benchmark.classes, int):
        return [str(number) for number in range(benchmark.classes)]
    if isinstance(benchmark.classes, str):
        return _weights_classes(benchmark.classes, f"data/benchmarks/{benchmark.name}.yaml")
    if benchmark.classes is not None:
        return benchmark.classes
    [ind] = benchmark.ind.values()
    names = class_names(ind.parts[0].source)
    if not names:
        raise SettingError(f"data/benchmarks/{benchmark.name}.yaml: classes: the InD source does not name them")
    return names


def _weights_classes(name: str, where: str) -> list[str]:
    from torchvision.models import get_weight

    try:
        return [str(each) for each in get_weight(name).meta["categories"]]
    except (ValueError, KeyError, AttributeError):
        raise SettingError(
            f"{where}: classes: {name!r} is not the name of weights of torchvision, as ResNet50_Weights.IMAGENET1K_V2"
        ) from None
