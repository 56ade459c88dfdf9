"""Pictures in files of every kind: one way to prepare them for all, and one walk over folders."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from small_detector import Made

from diffguard.cli.image_files import find_images
from diffguard.cli.main import main
from diffguard.deploy.bundle import save_bundle
from diffguard.errors import DataError
from diffguard.images import image_suffixes, read_image, read_picture, to_format, walk
from diffguard.models.classifiers.files import save_classifier
from diffguard.models.denoisers.loading import save_denoiser
from tasks.production.images import Production
from tasks.sources.readers import class_names, count, listed
from tasks.sources.settings import Folder


@pytest.fixture(scope="module")
def made(classifier, denoiser):
    return Made(classifier, denoiser)


@pytest.fixture(scope="module")
def photograph():
    """12 by 8, dark on the left, with some colour."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, 4:] = (200, 120, 40)
    pixels[2:4, 6:9] = (20, 250, 90)
    return Image.fromarray(pixels)


def turned(picture, path):
    """As a camera held sideways stores it: turned, with a note of how to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.rotate(90, expand=True).save(path, exif=exif, quality=100, subsampling=0)


KINDS = {
    "turned.jpg": turned,
    "plain.png": lambda p, path: p.save(path),
    "palette.png": lambda p, path: p.quantize(8).save(path),
    "clear.png": lambda p, path: p.convert("RGBA").save(path),
    "deep.png": lambda p, path: Image.fromarray(np.asarray(p.convert("L")).astype(np.uint16) * 257).save(path),
    "print.jpg": lambda p, path: p.convert("CMYK").save(path, quality=95),
    "lab.tif": lambda p, path: as_lab(p).save(path),
    "web.webp": lambda p, path: p.save(path, lossless=True),
    "new.avif": lambda p, path: p.save(path, quality=95),
    "old.jfif": lambda p, path: p.save(path, format="JPEG", quality=95),
}


def as_lab(picture):
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    return ImageCms.applyTransform(picture, to_lab)


@pytest.mark.parametrize("name", KINDS)
def test_a_pair_and_a_bundle_see_the_same(name, made, photograph, tmp_path):
    KINDS[name](photograph, tmp_path / name)
    bundled = made.detector("guided").prepare(read_picture(tmp_path / name))
    assert torch.equal(read_image(tmp_path / name, 1, 8, 8), bundled)
    # And it is the picture: upright, in its own shades.
    plain = torch.tensor(np.asarray(to_format(photograph, 8, "L"))) / 255
    assert (bundled[0] - plain).abs().mean() < 0.03


def test_the_command_scores_alike_by_a_pair_and_by_a_bundle(made, photograph, tmp_path, capsys):
    turned(photograph, tmp_path / "turned.jpg")
    save_bundle(made.detector("guided"), tmp_path / "bundle")
    save_classifier(made.classifier, tmp_path / "c.safetensors")
    save_denoiser(made.denoiser, tmp_path / "denoiser")
    variant = made.variants["guided"].model_dump_json()
    pair = ["--classifier", str(tmp_path / "c.safetensors"), "--denoiser", str(tmp_path / "denoiser")]
    pair += ["--variant", variant, "--resize", "8", "--crop", "8"]
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path / "turned.jpg"), *pair])
    by_pair = capsys.readouterr().out.split("\t")[2].split()[1]
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path / "turned.jpg"), "--detector", str(tmp_path / "bundle"), "--json"])
    by_bundle = json.loads(capsys.readouterr().out)["score"]
    assert float(by_pair) == pytest.approx(by_bundle, rel=1e-3)


MODES = {
    "1": (0, 1),
    "L": (0, 255),
    "LA": ((0, 255), (255, 255)),
    "La": ((0, 255), (255, 255)),
    "P": (0, None),
    "PA": ((0, 255), None),
    "RGB": ((0, 0, 0), (255, 255, 255)),
    "RGBA": ((0, 0, 0, 255), (255, 255, 255, 255)),
    "RGBa": ((0, 0, 0, 255), (255, 255, 255, 255)),
    "RGBX": ((0, 0, 0, 0), (255, 255, 255, 0)),
    "CMYK": ((0, 0, 0, 255), (0, 0, 0, 0)),
    "YCbCr": ((0, 128, 128), (255, 128, 128)),
    "LAB": ((0, 128, 128), (255, 128, 128)),
    "HSV": ((0, 0, 0), (0, 0, 255)),
    "I": (0, 65535),
    "F": (0.0, 255.0),
    "I;16": (0, 65535),
}
"""Of Pillow, with black and white in each."""


@pytest.mark.parametrize("to", ["L", "RGB"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_gray_and_colour(mode, to):
    black, white = MODES[mode]
    image = to_format(Image.new(mode, (9, 7), black), 4, to)
    assert (image.mode, image.size) == (to, (4, 4))
    assert np.asarray(image).max() <= 1  # LAB's black, rounded
    if white is not None:
        assert np.asarray(to_format(Image.new(mode, (9, 7), white), 4, to)).min() >= 254


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_an_error(value):
    pixels = np.zeros((4, 4), np.float32)
    pixels[1, 1] = value
    with pytest.raises(DataError, match=r"a\.tif: the image cannot be brought into shape \(a value in it is not"):
        to_format(Image.fromarray(pixels), 4, "L", name="a.tif")


def test_whatever_pillow_raises_is_that_pictures_error(made, tmp_path, monkeypatch, capsys):
    """And the others are decided."""
    save_bundle(made.detector("knn"), tmp_path / "bundle")
    (tmp_path / "in").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "in" / "a.png")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "in" / "b.tif")
    Image.new("L", (8, 8), 200).save(tmp_path / "in" / "c.png")
    with pytest.raises(SystemExit) as end:
        main(
            ["score", str(tmp_path / "in"), "--detector", str(tmp_path / "bundle"), "--output", str(tmp_path / "o.csv")]
        )
    assert end.value.code == 1
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert len(lines) == 4
    assert f"{tmp_path / 'in' / 'b.tif'}: the image cannot be brought into shape" in lines[2]
    capsys.readouterr()
    for command in (["explain", str(tmp_path / "in" / "b.tif"), "--output", str(tmp_path / "why.png")],
                    ["calibrate", str(tmp_path / "in"), "--output", str(tmp_path / "new")]):  # fmt: skip
        with pytest.raises(SystemExit, match=r"b\.tif: the image cannot be brought into shape"):
            main([*command, "--detector", str(tmp_path / "bundle")])


def save(*paths):
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, one of them behind a link; with a link to a folder within, a loop, hidden ones, and more."""
    root = tmp_path / "root"
    save(
        root / "ant" / "a.png", root / "ant" / "deep" / "b.jpg", tmp_path / "far" / "c.png", tmp_path / "far" / "d.AVIF"
    )
    save(root / "ant" / ".ipynb_checkpoints" / "a-checkpoint.png", root / "ant" / "__MACOSX" / "x.png")
    save(root / ".hidden" / "h.png", root / "ant" / ".h.png", tmp_path / "more" / "e.jfif")
    (root / "bee").symlink_to(tmp_path / "far")
    (root / "ant" / "linked").symlink_to(tmp_path / "more")
    (root / "ant" / "loop").symlink_to(root / "ant")
    (root / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (root / "ant" / "notes.txt").write_text("no image")
    (root / "ant" / "film.mov").write_text("no image")
    return root


EXPECTED = ["ant/a.png", "ant/deep/b.jpg", "ant/linked/e.jfif", "bee/c.png", "bee/d.AVIF"]


def test_one_walk_for_all(folder, capsys):
    found = walk(folder)
    assert [str(path.relative_to(folder)) for path in found.images] == EXPECTED
    assert found.told == ("4 passed over (1 .mov, 1 .txt, 1 folders linked twice, 1 that are no files)")
    assert find_images([folder]) == found.images
    assert capsys.readouterr().err == f"{folder}: {found.told}\n"
    assert [each.name for each in Production(str(folder))] == EXPECTED
    assert found.told in capsys.readouterr().out
    source = Folder(kind="folder", path=str(folder))
    assert [each.origin for each in listed(source)] == [str(path) for path in found.images]
    assert (class_names(source), count(source)) == (["ant", "bee"], 5)


def test_a_folder_of_nothing_but_other_files_says_what_they_are(tmp_path):
    (tmp_path / "x.pdf").write_text("no image")
    with pytest.raises(DataError, match=r"1 passed over \(1 \.pdf\)"):
        find_images([tmp_path])


def test_endings_are_pillows_own():
    assert {".png", ".jpg", ".jpeg", ".jfif", ".avif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"} <= (
        image_suffixes()
    )
    assert not {".pdf", ".eps", ".ps", ".mpg", ".h5", ".txt", ".npy"} & image_suffixes()


def test_the_order_of_an_ordinary_folder_is_that_of_its_paths(tmp_path):
    names = ["b/2.png", "b/10.png", "a.png", "b.png", "a/x.png", "a-b/x.png", "B/x.png"]
    save(*(tmp_path / name for name in names))
    assert walk(tmp_path).images == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_a_name_that_is_no_utf8(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    save(tmp_path / name / "a.png", tmp_path / "b.png")
    (tmp_path / name / os.fsdecode(b"\xff.txt")).write_text("no image")
    assert len(find_images([tmp_path])) == 2
    assert [each.name for each in Production(str(tmp_path))] == ["b.png", r"caf\udce9/a.png"]
