import torch
import torch.nn.functional as F

from diffguard.diffusion.cutouts import crop_and_resize, draw_crops, views_of


def test_crops_fit_the_image_and_depend_on_the_seed_alone():
    crops = draw_crops(steps=5, cutouts=8, side=16, cutout_size=7, seed=100)
    assert crops == draw_crops(steps=5, cutouts=8, side=16, cutout_size=7, seed=100)
    assert crops[:3] == draw_crops(steps=3, cutouts=8, side=16, cutout_size=7, seed=100)
    assert crops != draw_crops(steps=5, cutouts=8, side=16, cutout_size=7, seed=101)
    for size, ox, oy in (crop for step in crops for crop in step):
        assert 7 <= size < 16
        assert 0 <= ox <= 16 - size
        assert 0 <= oy <= 16 - size


def test_each_image_shows_its_own_cutout():
    """Rows and columns in one gather are the slice and the two resizes that the published code makes."""
    images = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    crops = draw_crops(steps=3, cutouts=4, side=16, cutout_size=7, seed=5)
    views = views_of(crops, cutout_size=7, input_size=11)
    step = torch.tensor([2, 0, 1])
    for cutout in range(4):
        shown = crop_and_resize(images, views[step, cutout])
        for row, (size, ox, oy) in enumerate(crops[int(each)][cutout] for each in step):
            piece = images[row : row + 1, :, oy : oy + size, ox : ox + size]
            twice = F.interpolate(F.interpolate(piece, size=7, mode="nearest"), size=11, mode="nearest")
            assert torch.equal(shown[row : row + 1], twice)
