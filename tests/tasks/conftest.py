import pytest
import yaml
from small_project import work_in, write_params

from tasks.prepare import prepare
from tasks.run import open_run
from tasks.settings import ROOT, load_benchmark
from tasks.train import train


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project folder with prepared images and models of seeds 0 and 1."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("project")
    work_in(patch, root)
    (root / "data" / "benchmarks").mkdir(parents=True)
    digits = yaml.safe_load((ROOT / "data" / "benchmarks" / "digits.yaml").read_text())
    digits["ind"]["digits-0-5"]["splits"] = {"train": 60, "calibration": 24, "validation": 12, "test": 18}
    for dataset in (*digits["near"].values(), *digits["far"].values()):
        dataset["splits"] = dict.fromkeys(dataset["splits"], 6)
    (root / "data" / "benchmarks" / "digits.yaml").write_text(yaml.safe_dump(digits))
    write_params(root)
    prepare(load_benchmark("digits"), root / "data" / "digits", seed=0)
    run = open_run()
    for model in ("denoiser", "ordinary", "strong"):
        train(run, model, 0)
    yield root
    patch.undo()
