"""Which rows, classifiers and seeds a run has: params.yaml's, a benchmark's, or those that were chosen."""

from diffguard.errors import SettingError
from diffguard.settings import DISTANCES, Variant
from tasks.common.text import known_name
from tasks.config.benchmark import Benchmark
from tasks.config.params import Params


def with_its_rows(params: Params, benchmark: Benchmark) -> Params:
    """params.yaml's rows and the benchmark's own; variants come in place of those of the same name."""
    where = f"data/benchmarks/{benchmark.name}.yaml"
    for name in benchmark.variants:
        if name in params.names and name not in params.score.variants:
            raise SettingError(f"{where}: variants: {name} is the name of another kind of row in params.yaml")
    score = params.score.model_copy(update={"variants": {**params.score.variants, **benchmark.variants}})
    found = params.model_copy(update={"score": score})
    for name, combination in benchmark.combine.items():
        if name in found.names:
            raise SettingError(f"{where}: combine: {name} is the name of another row; choose a new one")
        known_name(f"{where}: combine.{name}.of", list(combination.of), found.names)
        found = found.model_copy(update={"combine": {**found.combine, name: combination}})
    return found


def of_benchmark(params: Params, benchmark: Benchmark, *, recorded: bool) -> Params:
    """params.yaml as it is for a benchmark: its classifiers, variants and default."""
    where = f"data/benchmarks/{benchmark.name}.yaml"
    if recorded:
        known_name("params.yaml: classifiers", params.classifiers, benchmark.classifiers)
    chosen = params.model_copy(
        update={
            "benchmark": benchmark.name,
            "classifiers": params.classifiers if recorded else list(benchmark.classifiers),
        }
    )
    if benchmark.detectors is not None:
        chosen = choose(chosen, params, f"{where}: detectors", benchmark.detectors)
    if benchmark.default is not None:
        known_name(f"{where}: default", [benchmark.default], chosen.names)
        evaluate = chosen.evaluate.model_copy(update={"default": benchmark.default})
        chosen = chosen.model_copy(update={"evaluate": evaluate})
    if benchmark.detectors is not None:
        see_train(f"{where}: detectors", chosen, benchmark)
    elif not _has_train(benchmark):
        chosen = chosen.without(chosen.score.need_train)
    if benchmark.detectors is None and not _has_validation(benchmark):
        chosen = chosen.without(_choosing(chosen))
    return of_size(chosen, benchmark)


def _has_train(benchmark: Benchmark) -> bool:
    [ind] = benchmark.ind.values()
    return "train" in ind.splits


def see_train(option: str, params: Params, benchmark: Benchmark) -> None:
    """Raise a SettingError if a row that was asked for is fitted on a split that is not there."""
    if not _has_train(benchmark) and (needing := params.score.need_train):
        raise SettingError(f"{option}: {needing[0]} is fitted on a split train, which ind does not have")


def _choosing(params: Params) -> list[str]:
    """The combinations that need a split validation."""
    return [name for name, combination in params.combine.items() if combination.chooses]


def _has_validation(benchmark: Benchmark) -> bool:
    """Whether there are InD and OOD images to choose between settings by."""
    [ind] = benchmark.ind.values()
    return "validation" in ind.splits and any("validation" in each.splits for each in benchmark.ood.values())


def check_choosing(params: Params, benchmark: Benchmark) -> None:
    """Raise a SettingError if a combination was asked for that has nothing to choose by."""
    if (choosing := _choosing(params)) and not _has_validation(benchmark):
        raise SettingError(
            f"combine.{choosing[0]}: a {params.combine[choosing[0]].kind} is chosen on a split validation of InD and "
            f"of OOD images, which data/benchmarks/{benchmark.name}.yaml does not have"
        )


def of_size(params: Params, benchmark: Benchmark) -> Params:
    """With the benchmark's process_method where a variant names none."""
    variants = {
        name: each
        if "process_method" in each.model_fields_set
        else each.model_copy(update={"process_method": benchmark.process_method})
        for name, each in params.score.variants.items()
    }
    return params.model_copy(update={"score": params.score.model_copy(update={"variants": variants})})


def why_too_small(variant: Variant, size: int) -> str | None:
    """Which of a variant's distances takes no images of this side, in pixels, and from where on; None: none."""
    for distance in variant.distances:
        least = DISTANCES[distance].min_size if distance in DISTANCES else 1
        if size < least:
            return f"{distance} takes images from {least} pixels up"
    return None


def choose(params: Params, pool: Params, option: str, names: list[str]) -> Params:
    """Only the rows of these names, out of what params.yaml has, and those that combinations among them need."""
    known_name(option, names, pool.names)
    if not names:
        raise SettingError(f"{option}: the list is empty")
    kept = pool.only(names)
    return params.model_copy(update={"score": kept.score, "combine": kept.combine})
