import pytest
import torch
from diffusers import DDIMScheduler

from diffguard.ddim import ddim_move, even_grid, predict_eps, predict_x0
from diffguard.errors import SettingError


def test_grid_of_ten_levels_is_the_documented_one():
    abar = torch.linspace(0.999, 0.001, 1000)
    grid = even_grid(abar, 10)
    assert grid.timesteps.tolist() == [49, 99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert grid.abar[0] == 1
    assert torch.equal(grid.abar[1:], abar.double()[99::100])


@pytest.mark.parametrize("levels", [0, 3, 1000])
def test_grid_refuses_levels_that_make_no_even_strides(levels):
    with pytest.raises(SettingError, match="levels"):
        even_grid(torch.linspace(0.999, 0.001, 1000), levels)


def test_a_move_is_the_step_of_diffusers_own_ddim_scheduler():
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    grid = even_grid(scheduler.alphas_cumprod, 10)
    x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for level in (10, 5, 2):
        theirs = scheduler.step(eps, int(grid.timesteps[level]), x).prev_sample
        x0 = predict_x0(x, eps, grid.abar_like(level, x))
        assert torch.allclose(ddim_move(x0, eps, grid.abar_like(level - 1, x)), theirs, atol=1e-5)


def test_eps_and_x0_imply_each_other():
    x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    abar = torch.tensor(0.3)
    assert torch.allclose(predict_eps(x, predict_x0(x, eps, abar), abar), eps, atol=1e-5)
