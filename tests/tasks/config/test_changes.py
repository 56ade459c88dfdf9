"""Each change of appearance does what it says, more so with its strength, and keeps mode and size."""

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from diffguard.errors import SettingError
from diffguard.settings import ImageFormat
from tasks.config.changes import CHANGES, Blurred, Inverted, Jpeg, Monochrome, Padded, Rescaled, parse_change

GRAY, COLOR = ImageFormat(size=16, mode="L"), ImageFormat(size=16, mode="RGB")
STRENGTHS = {
    "monochrome": [0.25, 0.5, 1],
    "inverted": [0.1, 0.5, 1],
    "rescaled": [1.5, 2, 4],
    "padded": [0.07, 0.125, 0.25],
    "blurred": [0.5, 1, 2],
    "jpeg": [90, 50, 5],
}


def picture(mode):
    """A colored square on a gradient, with noise on it."""
    rng = np.random.default_rng(0)
    pixels = np.linspace(60, 180, 16)[None, :, None] + np.array([30.0, 0, -30]) + rng.normal(0, 12, (16, 16, 3))
    pixels[4:12, 4:12] = (230, 40, 90)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def values(image):
    return np.asarray(image).astype(float)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", CHANGES)
def test_more_of_a_change_is_farther_from_the_image_and_has_its_shape(kind, mode):
    before = picture(mode)
    changes = [CHANGES[kind](kind=kind, **{CHANGES[kind].strength: each}) for each in STRENGTHS[kind]]
    after = [change.apply(before) for change in changes]
    assert all((each.mode, each.size) == (mode, (16, 16)) for each in after)
    distances = [np.abs(values(each) - values(before)).mean() for each in after]
    if (kind, mode) == ("monochrome", "L"):
        assert distances == [0, 0, 0]
    else:
        assert 0 < distances[0] < distances[1] < distances[2]
    assert [change.value for change in changes] == STRENGTHS[kind]


def bends(image):
    """How much neighbours differ from the line through them."""
    return np.abs(np.diff(values(image), n=2)).mean()


def test_each_kind_does_what_it_says():
    color, gray = picture("RGB"), picture("L")
    assert values(Inverted(kind="inverted").apply(color)).tolist() == (255 - values(color)).tolist()
    assert np.ptp(values(Inverted(kind="inverted", amount=0.5).apply(gray))) <= 1
    mono = values(Monochrome(kind="monochrome").apply(color))
    assert (mono == values(color.convert("L"))[..., None]).all()
    padded = values(Padded(kind="padded", border=0.25, fill=7).apply(gray))
    assert (padded[:4] == 7).all()
    assert (padded[:, -4:] == 7).all()
    assert (padded[4:12, 4:12] == values(gray.resize((8, 8), Image.Resampling.BICUBIC))).all()
    blurred, rescaled = Blurred(kind="blurred", radius=2).apply(gray), Rescaled(kind="rescaled", factor=4).apply(gray)
    for soft in (blurred, rescaled):
        assert bends(soft) < 0.5 * bends(gray)
        assert values(soft).mean() == pytest.approx(values(gray).mean(), rel=0.05)
    assert len(np.unique(values(Jpeg(kind="jpeg", quality=1).apply(gray)))) < len(np.unique(values(gray)))


@pytest.mark.parametrize(
    ("settings", "image", "says"),
    [
        ({"kind": "monochrome"}, GRAY, "change: monochrome changes no image of mode L"),
        ({"kind": "padded", "border": 0.01}, COLOR, "is no pixel of 16"),
        ({"kind": "rescaled", "factor": 1.01}, COLOR, "leaves 16 pixels as they are"),
        ({"kind": "blurred", "radius": 0}, COLOR, "radius"),
        ({"kind": "jpeg", "quality": 96}, COLOR, "quality"),
        ({"kind": "sepia"}, COLOR, "sepia"),
        ({"kind": "jpeg", "quality": 50, "amount": 1}, COLOR, "amount"),
    ],
)
def test_what_changes_nothing_or_is_out_of_range_is_refused_in_one_line(settings, image, says):
    with pytest.raises(SettingError, match=says) as error:
        parse_change(settings, image)
    assert "\n" not in str(error.value)


def test_a_change_cannot_be_altered():
    with pytest.raises(ValidationError):
        Jpeg(kind="jpeg", quality=50).quality = 10
