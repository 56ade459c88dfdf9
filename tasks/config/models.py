"""A benchmark with other models than its file has."""

from collections.abc import Mapping
from typing import Any

from diffguard.settings import ClassifierSpec, DenoiserSpec, parse_settings
from tasks.config.benchmark import DENOISER, Benchmark


def with_models(benchmark: Benchmark, models: Mapping[str, Mapping[str, Any]]) -> tuple[Benchmark, frozenset[str]]:
    """A benchmark with other models.

    Args:
        models: by name, "denoiser" or a classifier's, keys in place of those of the benchmark's spec. With another
            ``kind`` than the benchmark's, or a classifier's name that it does not have, they are the whole spec.

    Returns:
        The benchmark, and the names of those models that are now others than in its file.

    Raises:
        SettingError: a key or value is wrong; the message names it.
    """
    written: dict[str, Any] = {DENOISER: benchmark.denoiser, **benchmark.classifiers}
    specs = dict(written)
    for name, keys in models.items():
        kind: Any = DenoiserSpec if name == DENOISER else ClassifierSpec
        base = written.get(name)
        if base is not None and keys.get("kind", base.kind) == base.kind:
            keys = {**base.own(), **keys}
        specs[name] = parse_settings(kind, keys, f"models.{name}")
    replaced = frozenset(name for name, spec in specs.items() if spec != written.get(name))
    if not replaced:
        return benchmark, replaced
    fields = {name: getattr(benchmark, name) for name in benchmark.model_fields_set}
    fields |= {"denoiser": specs.pop(DENOISER), "classifiers": specs}
    return parse_settings(Benchmark, fields, "models"), replaced
