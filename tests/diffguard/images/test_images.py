import io

import numpy as np
import pytest
from PIL import Image

from diffguard.images import upright

PIXELS = np.arange(8 * 12, dtype=np.uint8).reshape(8, 12)


@pytest.mark.parametrize(
    ("orientation", "expected"), [(1, PIXELS), (3, np.rot90(PIXELS, 2)), (6, np.rot90(PIXELS, -1))]
)
def test_pictures_are_turned_as_their_exif_says(orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", exif=exif)
    with Image.open(stream) as picture:
        assert np.array_equal(np.asarray(upright(picture)), expected)
