import pytest
from small_project import work_in, write_benchmark, write_params

from tasks.prepare import prepare
from tasks.run import open_run
from tasks.settings import load_benchmark
from tasks.train import train


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder with prepared images and models of seeds 0 and 1."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("project")
    work_in(patch, root)
    write_benchmark(root)
    write_params(root)
    prepare(load_benchmark("digits"), root / "data" / "digits", seed=0)
    run = open_run()
    for model in ("denoiser", "ordinary", "strong"):
        train(run, model, 0)
    yield root
    patch.undo()
