"""Monitoring and recalibration, of a tiny bundle on a real MLflow store."""

import io
import os
import re
from dataclasses import replace

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score
from small_detector import Made, pictures, tiny_classifier, tiny_denoiser
from small_project import work_in, write_params
from upath import UPath

import diffguard.mlflow as flavor
from diffguard.deploy.bundle import load_bundle, save_bundle
from diffguard.errors import DataError, DiffGuardError, SettingError
from diffguard.images import to_picture
from tasks.production.detector import default_detector
from tasks.production.monitor import Monitoring, observe
from tasks.production.recalibrate import Recalibration, recalibrate, register
from tasks.production.report import log, report, verdict_line, warnings
from tasks.services.registry import ALIAS, model_name

IND, OOD = pictures(80, 11), (pictures(80, 12) > 0.5).float()


def write_images(folder, images):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        to_picture(image).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project folder with a bundle, and images of production."""
    patch = pytest.MonkeyPatch()
    root = tmp_path_factory.mktemp("monitored")
    work_in(patch, root)
    write_params(root, lambda params: params.update(combine={}))
    made = Made(tiny_classifier(), tiny_denoiser())
    save_bundle(made.detector("pixel-knn"), root / "bundle")
    save_bundle(made.detector("fused"), root / "fused")
    write_images(root / "ind", IND)
    write_images(root / "ood", OOD)
    write_images(root / "mixed" / "deep", IND[:60])
    write_images(root / "mixed", OOD[:6])
    yield root
    patch.undo()
    mlflow.set_tracking_uri(None)


def look(place, images, **options):
    return observe(Monitoring(images=str(images), detector=str(place / "bundle"), **options))


def run_of(run_id):
    return mlflow.MlflowClient().get_run(run_id)


def artifacts(run_id):
    return {each.path for each in mlflow.MlflowClient().list_artifacts(run_id)}


def test_ind_images_keep_the_guarantee_and_everything_is_logged(place):
    observed = look(place, place / "ind")
    decisions = load_bundle(place / "bundle").decide(IND)
    assert observed.table["image"].tolist() == [f"{number:03d}.png" for number in range(80)]
    assert np.allclose(observed.table["score"], [each.score for each in decisions], atol=1e-5)
    assert observed.table["is_ood"].tolist() == [each.is_ood for each in decisions]
    assert (observed.verdict, observed.fails) == ("kept", False)
    run = run_of(log(observed))
    assert mlflow.MlflowClient().get_experiment(run.info.experiment_id).name == "diffguard-monitor"
    assert run.info.status == "FINISHED"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d · ind", run.info.run_name)
    assert run.data.metrics["rejection_rate"] == np.mean([each.is_ood for each in decisions])
    assert run.data.metrics["expected_rate"] == 0.05
    assert run.data.metrics["promise_broken"] == 0
    assert run.data.metrics["images"] == 80
    assert run.data.params["detector.bundle_hash"] == load_bundle(place / "bundle").bundle_hash
    assert artifacts(run.info.run_id) == {"scores.csv", "by-class.csv", "report.md", "p-values.png", "most-ood.png"}
    assert "**The guarantee is kept**" in run.data.tags["mlflow.note.content"]
    assert observed.by_class["predicted"].sum() == 80


def test_ood_images_break_it(place):
    observed = look(place, place / "ood")
    assert (observed.verdict, observed.fails) == ("broken", True)
    assert re.fullmatch(
        r"rejected 100 % \(95\.5-100 %\) of 80 images, alpha 5 % "
        r"\(by chance of 40 calibration images up to [\d.]+ %\)",
        verdict_line(observed),
    )
    [warning] = warnings(observed)
    assert "Kolmogorov-Smirnov" in warning
    run = run_of(log(observed))
    assert (run.info.status, run.data.tags["promise"], run.data.metrics["promise_broken"]) == ("FAILED", "broken", 1)
    assert not look(place, place / "ood", on_broken="warn").fails
    assert look(place, place / "ood", expected_rate=0.99).verdict == "kept"


def test_the_most_ood_images_are_shown_and_named(place):
    observed = look(place, place / "mixed")
    shown = [row.image for _, row in observed.most_ood]
    assert set(shown[:6]) == {f"{number:03d}.png" for number in range(6)}
    assert all(name.startswith("deep/") for name in shown[6:])
    assert len(shown) == 24
    order = [(row.p_value, -row.score) for _, row in observed.most_ood]
    assert order == sorted(order)
    rest = observed.table[~observed.table["image"].isin(shown)]
    assert rest["p_value"].min() >= order[-1][0]
    picture, row = observed.most_ood[0]
    assert np.array_equal(np.asarray(picture), np.asarray(to_picture(OOD[int(row.image[:3])])))
    lines = report(observed).splitlines()
    assert (
        lines[0]
        == f"**The guarantee is {'kept' if observed.verdict == 'kept' else 'broken'}**: " + verdict_line(observed) + "."
    )
    assert f"| rejected | {observed.rejection.count} of 66 |" in lines


def bytes_of(image, kind="PNG"):
    stream = io.BytesIO()
    to_picture(image).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["paths", "whole paths", "bytes", "datasets", "URL of a folder"])
def test_a_table_or_a_url_gives_what_the_folder_gives(place, kind, tmp_path):
    names = [f"{number:03d}.png" for number in range(70)]
    where, options = place / f"{kind}.parquet", {}
    if kind == "paths":
        pq.write_table(pa.table({"path": [f"ind/{name}" for name in names], "other": range(70)}), where)
    elif kind == "whole paths":
        pq.write_table(pa.table({"file": [str(place / "ind" / name) for name in names]}), where)
        options = {"column": "file"}
    elif kind == "bytes":
        pq.write_table(pa.table({"image": [bytes_of(image) for image in IND[:70]]}), where, row_group_size=16)
    elif kind == "datasets":
        pq.write_table(pa.table({"image": [{"bytes": bytes_of(each), "path": None} for each in IND[:70]]}), where)
    else:
        where = "memory://monitored/images"
        for name in names:
            target = UPath(where) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((place / "ind" / name).read_bytes())
    observed = look(place, where, **options)
    expected = look(place, place / "ind").table[:70]
    assert np.allclose(observed.table["score"], expected["score"], atol=1e-5)
    assert observed.table["image"].is_unique
    assert not observed.unreadable


def test_a_damaged_image_is_named_counted_and_left_out(place, tmp_path):
    write_images(tmp_path, IND[:60])
    content = (tmp_path / "003.png").read_bytes()
    (tmp_path / "003.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")
    observed = look(place, tmp_path)
    assert len(observed.table) == 59
    [message] = observed.unreadable
    assert message.startswith(f"{tmp_path}/003.png: the image cannot be read")
    run_id = log(observed)
    assert run_of(run_id).data.metrics["unreadable"] == 1
    assert "unreadable.txt" in artifacts(run_id)
    assert observed.verdict == "kept"
    assert any("1 image cannot be read" in each for each in warnings(observed))
    strict = look(place, tmp_path, most_unreadable=0.01)
    assert (strict.verdict, strict.fails) == ("unreadable", True)
    assert re.match(
        r"1 of 60 images cannot be read \(1\.7 %\), more than 1 %; the first: .*003\.png", verdict_line(strict)
    )


def test_lost_and_empty_rows_of_a_table_are_left_out(place):
    where = place / "lost.parquet"
    values = [bytes_of(image) for image in IND[:58]] + [None, b"no image"]
    pq.write_table(pa.table({"image": values}), where)
    observed = look(place, where)
    assert len(observed.table) == 58
    assert [each.split(":")[0] for each in observed.unreadable] == ["row 58", "row 59"]
    pq.write_table(pa.table({"path": ["ind/000.png", "ind/nowhere.png"]}), where)
    [message] = look(place, where).unreadable
    assert message == f"{place}/ind/nowhere.png: the image cannot be read (No such file or directory)"


def test_a_damaged_page_of_a_table_is_one_line(place, tmp_path):
    rng = np.random.default_rng(0)
    values = [rng.integers(0, 4, 2000, np.uint8).tobytes() for _ in range(300)]
    where = tmp_path / "damaged.parquet"
    pq.write_table(pa.table({"image": values}), where, row_group_size=100, use_dictionary=False)
    content = bytearray(where.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 3000] = rng.bytes(3000)
    where.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged.parquet: damaged after row 64 \(Corrupt snappy.*\); write it again"):
        look(place, where)


def test_a_file_name_that_is_not_utf8_loses_nothing(place, tmp_path):
    folder = write_images(tmp_path / "images", IND[:58])
    names = [os.fsdecode(each) for each in (b"caf\xe9.png", b"d\xe9truit.png")]
    to_picture(IND[58]).save(folder / names[0])
    (folder / names[1]).write_bytes(b"")
    observed = look(place, folder)
    assert observed.table["image"].tolist()[-1] == r"caf\udce9.png"
    [message] = observed.unreadable
    assert r"d\udce9truit.png: the image cannot be read" in message
    run_id = log(observed)
    assert {"scores.csv", "unreadable.txt"} <= artifacts(run_id)
    (folder / names[1]).unlink()
    made = calibrated(place, folder, output=str(tmp_path / "new"))
    assert r"caf\udce9.png" in set(load_bundle(made.folder).calibration["id"])


def test_labels_beyond_the_classes_are_counted_too(place):
    observed = look(place, place / "ind")
    table = observed.table.assign(label=[9, 9, 7, *observed.table["label"].tolist()[3:]])
    table["is_ood"] = [True, False, True] + [False] * 77
    by_class = replace(observed, table=table).by_class
    assert by_class.columns.tolist() == ["class_name", "predicted", "rejected", "rate"]
    assert by_class["class_name"].tolist() == [*observed.info.classes, "label 7", "label 9"]
    assert by_class["predicted"].sum() == 80
    assert by_class.loc[[7, 9], ["predicted", "rejected", "rate"]].to_numpy().tolist() == [[1, 1, 1], [2, 1, 0.5]]


def test_with_too_few_images_nothing_is_judged(place):
    observed = look(place, place / "ood", limit=10)
    assert (len(observed.table), observed.verdict, observed.fails) == (10, "too few", False)
    assert verdict_line(observed).startswith("too few images for a verdict (10, at least 50): rejected 100 %")
    again = look(place, place / "ood", limit=10, at_least=10)
    assert again.verdict == "broken"
    assert again.table["image"].tolist() == observed.table["image"].tolist()
    assert len(set(again.table["image"]) & {f"{number:03d}.png" for number in range(10)}) < 10


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda path: path.mkdir(), {}, "no images in this folder"),
        (lambda path: None, {}, "no such folder of images, nor a Parquet file"),
        (lambda path: path.write_text("text"), {}, "neither a folder nor a Parquet file"),
        (lambda path: pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path), {}, "no rows"),
        (lambda path: pq.write_table(pa.table({"a": [b""]}), path), {}, "neither image nor path; name one of a"),
        (lambda path: pq.write_table(pa.table({"a": [1]}), path), {"column": "a"}, "a of .* is int64; it has to be"),
        (lambda path: pq.write_table(pa.table({"a": [1]}), path), {"column": "b"}, "has no 'b'; name one of a"),
        (lambda path: write_images(path, IND[:2]), {"column": "b"}, "is a folder; a Parquet file has columns"),
        (
            lambda path: pq.write_table(pa.table({"image": [b"x"]}), path),
            {},
            "none of 1 images can be read; the first:",
        ),
    ],
)
def test_what_cannot_be_monitored_is_one_line(place, tmp_path, make, options, message):
    make(tmp_path / "images")
    with pytest.raises((DataError, SettingError), match=message) as error:
        look(place, tmp_path / "images", **options)
    assert "\n" not in str(error.value)


def test_the_detector_is_the_champion_or_the_projects_own(place):
    folder = place / "data" / "digits" / "detector"
    with pytest.raises(DataError, match=r"neither models:/diffguard-digits@champion nor .*data/digits/detector"):
        default_detector()
    save_bundle(load_bundle(place / "bundle"), folder)
    assert default_detector() == str(folder)
    mlflow.set_experiment(experiment_id="0")
    with mlflow.start_run():
        info = flavor.log_model(place / "fused", registered_model_name="diffguard-digits")
    assert default_detector() == str(folder)
    mlflow.MlflowClient().set_registered_model_alias("diffguard-digits", ALIAS, info.registered_model_version)
    assert default_detector() == "models:/diffguard-digits/1"
    observed = observe(Monitoring(images=str(place / "ind"), limit=20))
    assert (observed.info.detector, observed.detector) == ("fused", "models:/diffguard-digits/1")


def calibrated(place, images, **options):
    return recalibrate(Recalibration(images=str(images), detector=str(place / "fused"), **options))


def test_a_detector_is_recalibrated_and_registered(place):
    client = mlflow.MlflowClient()
    made = calibrated(place, place / "ind", accept=0.9)
    assert made.folder.parent == place / "data" / "tiny" / "detectors"
    before, after = load_bundle(place / "fused"), load_bundle(made.folder)
    assert (before.alpha, after.alpha, len(after.calibration)) == (0.05, 0.1, 80)
    assert after.info.detector == "fused"
    # An image's rank among the members' calibration scores is another, so is its score.
    assert set(after.calibration["id"]) == {f"{number:03d}.png" for number in range(80)}
    uri = register(made)
    assert uri == f"models:/{model_name('tiny')}/1"
    version = client.get_model_version(model_name("tiny"), "1")
    assert version.tags["calibrated_from"] == str(place / "fused")
    assert version.tags["calibrated_on"] == f"80 images of {place}/ind"
    assert version.tags["champion_decision"].startswith("the alias champion stays where it was")
    assert client.get_registered_model(model_name("tiny")).aliases == {}
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    [model] = run.outputs.model_outputs
    assert client.get_logged_model(model.model_id).experiment_id == run.info.experiment_id
    assert (run.data.metrics["alpha_before"], run.data.metrics["alpha_after"]) == (0.05, 0.1)
    rejected = after.conformal.rejects(after.validation["score"], after.validation["predicted"])
    near = rejected[(after.validation["dataset"] == "near").to_numpy()].mean()
    assert run.data.metrics["validation_rejected_after/near"] == pytest.approx(near)
    assert "| alpha | 5 % | 10 % |" in version.description
    assert after.validation["role"].tolist() == ["ind"] * 20 + ["near"] * 20
    auroc = roc_auc_score(after.validation["role"] != "ind", after.validation["score"])
    assert run.data.metrics["validation_auroc_after/near"] == pytest.approx(auroc)
    assert (version.tags["test_figures"], "test split" in version.description) == ("none", False)
    promoted = register(calibrated(place, place / "ind", promote=True, output=str(place / "promoted")))
    champion = client.get_model_version_by_alias(model_name("tiny"), ALIAS)
    assert (str(champion.version), promoted) == ("2", f"models:/{model_name('tiny')}/2")


def test_images_that_were_rejected_are_accepted_by_what_was_calibrated_on_such(place):
    where = place / "calibrated-on-ood"
    recalibrate(Recalibration(images=str(place / "ood"), detector=str(place / "bundle"), output=str(where)))
    write_images(place / "ood-2", (pictures(80, 13) > 0.5).float())
    assert look(place, place / "ood-2").verdict == "broken"
    assert observe(Monitoring(images=str(place / "ood-2"), detector=str(where))).verdict == "kept"


def test_calibration_leaves_no_image_out(place, tmp_path):
    write_images(tmp_path / "images", IND[:30])
    (tmp_path / "images" / "003.png").write_text("no image")
    with pytest.raises(DataError, match=r"003\.png: the image cannot be read"):
        calibrated(place, tmp_path / "images", output=str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(SettingError, match="needs at least 99 calibration images, there are 80"):
        calibrated(place, place / "ind", accept=0.99, output=str(tmp_path / "new"))
    with pytest.raises(DiffGuardError, match=r"is there already; name a new folder"):
        calibrated(place, place / "ind", output=str(place / "bundle"))
