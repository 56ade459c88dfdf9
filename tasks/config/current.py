"""A run as its files are now, resolved once a process."""

from collections.abc import Hashable
from threading import Lock
from typing import Any

from diffguard.utils.hashing import file_state
from diffguard.utils.text import read_text
from tasks.config import project
from tasks.config.benchmark import Benchmark
from tasks.config.params import load_params
from tasks.config.precision import NOTE
from tasks.config.run import Run, open_run

KEPT = 40
"""Runs that a process keeps: a flow has one, and its copy in a shared place; a study has several."""

_kept: dict[Hashable, tuple[Run, Hashable]] = {}
_keeping = Lock()


def current_run(**choices: Any) -> Run:
    """`open_run` with these choices, resolved again only if something that it was made of has changed.

    The tasks of a flow are given plain choices, so that any runner can send them anywhere, and each asks for its run
    here. A kept run is that of the same project folder and choices, and stays for as long as all these do: the text
    of params.yaml and of the benchmark's and the study's file, the state (`file_state`) of the manifest and of the note
    that says what ``precision: auto`` means, and which of the places that the benchmark names are there, since a name
    that is no place is an id of a hub. So a process sees a manifest that `prepare` wrote after the run was opened, and
    a worker of Prefect or Ray that serves one run after another sees edited settings. What a run has computed of its
    manifest stays with it. Models are no part of a run: their hashes are kept by the state of their folders, see
    `diffguard.utils.hashing.hash_unchanged`.

    A run behind a URL (``data``) is resolved each time: its manifest has no state that can be asked for.

    Args:
        choices: see `open_run`.
    """
    if choices.get("data") is not None:
        return open_run(**choices)
    key = (project.ROOT, *sorted((name, repr(value)) for name, value in choices.items() if value is not None))
    with _keeping:  # of tasks in threads, one resolves and the others wait
        if key in _kept:
            run, made_of = _kept[key]
            if made_of == (_files(run.benchmark.name, choices.get("study")), _places(run.benchmark)):
                return run
        # The files before the run: what is written in between is seen the next time.
        files = _files(choices.get("benchmark") or load_params().benchmark, choices.get("study"))
        run = open_run(**choices)
        _kept.pop(key, None)
        _kept[key] = run, (files, _places(run.benchmark))
        while len(_kept) > KEPT:
            del _kept[next(iter(_kept))]
        return run


def _files(benchmark: str, study: str | None) -> Hashable:
    """params.yaml, the benchmark's file and the study's, which are small, by their text; the rest by its state."""
    data = project.ROOT / "data"
    settings = [project.ROOT / "params.yaml", data / "benchmarks" / f"{benchmark}.yaml"]
    if study is not None:
        settings.append(data / "studies" / f"{study}.yaml")
    texts = [read_text(path) if path.is_file() else None for path in settings]
    home = data / benchmark
    return (*texts, file_state(home / "manifest.parquet"), file_state(home / "scores" / NOTE))


def _places(benchmark: Benchmark) -> Hashable:
    """Which of the places of models and sources are there."""
    datasets = [*benchmark.ind.values(), *benchmark.ood.values()]
    named: list[Any] = [benchmark.denoiser, *benchmark.classifiers.values()]
    named += [part.source for dataset in datasets for part in dataset.parts]
    places = (getattr(each, key, None) for each in named for key in ("path", "root"))
    return tuple((project.ROOT / place).exists() for place in places if place is not None)
