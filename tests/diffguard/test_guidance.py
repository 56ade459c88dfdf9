import torch

from diffguard.guidance import cut, draw_crops


def test_crops_fit_the_image_and_depend_on_the_seed_alone():
    crops = draw_crops(steps=5, cutouts=8, side=16, cutout_size=7, seed=100)
    assert crops == draw_crops(steps=5, cutouts=8, side=16, cutout_size=7, seed=100)
    assert crops[:3] == draw_crops(steps=3, cutouts=8, side=16, cutout_size=7, seed=100)
    assert crops != draw_crops(steps=5, cutouts=8, side=16, cutout_size=7, seed=101)
    for size, ox, oy in (crop for step in crops for crop in step):
        assert 7 <= size < 16
        assert 0 <= ox <= 16 - size
        assert 0 <= oy <= 16 - size


def test_a_cut_takes_the_place_that_it_names():
    image = torch.arange(64.0).view(1, 1, 8, 8)
    assert torch.equal(cut(image, (3, 2, 5), 3), image[:, :, 5:8, 2:5])
