import numpy as np
import pytest
from PIL import Image

from diffguard.errors import DataError
from tasks.common.files import read_images
from tasks.config.benchmark import Dataset, Part, load_benchmark
from tasks.prepare.stage import prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, prepare(load_benchmark("digits"), folder, seed=0)


def test_counts_are_the_benchmarks(prepared):
    _, manifest = prepared
    counts = manifest.groupby(["role", "dataset", "split"]).size().to_dict()
    assert counts == {
        ("ind", "digits-0-5", "train"): 560,
        ("ind", "digits-0-5", "calibration"): 160,
        ("ind", "digits-0-5", "validation"): 63,
        ("ind", "digits-0-5", "test"): 300,
        ("near", "digits-6-8", "test"): 300,
        ("near", "digit-9", "validation"): 100,
        ("far", "letters", "test"): 100,
        ("far", "patches", "test"): 100,
        ("far", "noise", "test"): 100,
        ("far", "symbols", "validation"): 100,
    }


def test_classes_are_stratified_and_ood_has_no_label(prepared):
    _, manifest = prepared
    ind = manifest[manifest["role"] == "ind"]
    share = ind.groupby(["split", "label"]).size().unstack()
    expected = np.outer(share.sum(axis=1), share.sum(axis=0)) / len(ind)
    assert np.abs(share.to_numpy() - expected).max() < 2
    assert (manifest.loc[manifest["role"] != "ind", "label"] == -1).all()


def test_every_image_is_of_one_format_and_comes_once(prepared):
    folder, manifest = prepared
    assert manifest["content_hash"].is_unique
    levels = set(np.round(np.arange(17) * 255 / 16).astype(int))
    for path in manifest["path"]:
        with Image.open(folder / path) as image:
            assert (image.size, image.mode, image.format) == ((8, 8), "L", "PNG")
            assert set(np.unique(image)) <= levels


def test_the_seed_decides(prepared, tmp_path):
    _, manifest = prepared
    assert prepare(load_benchmark("digits"), tmp_path / "again", seed=0).equals(manifest)
    other = prepare(load_benchmark("digits"), tmp_path / "other", seed=1)
    assert not other["content_hash"].equals(manifest["content_hash"])


def test_an_image_that_changed_is_named(prepared, tmp_path):
    folder, manifest = prepared
    rows = manifest.iloc[:2].copy()
    assert read_images(folder, rows).shape == (2, 1, 8, 8)
    rows.loc[1, "content_hash"] = "0" * 64
    with pytest.raises(DataError, match=f"{rows.loc[1, 'path']}: not the image"):
        read_images(folder, rows)


def test_a_source_with_too_few_images_is_named(tmp_path):
    benchmark = load_benchmark("digits")
    [part] = benchmark.near["digits-6-8"].parts
    near = {"digits-6-8": Dataset(parts=(Part(source=part.source, splits={"test": 600}),))}
    with pytest.raises(DataError, match="digits-6-8: 600 images are asked for"):
        prepare(benchmark.model_copy(update={"near": near}), tmp_path, seed=0)
