import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepInverseScheduler, DPMSolverMultistepScheduler

from diffguard.diffusion.ddim import Coefficients, ddim_step, ddim_update, predict_eps, predict_x0
from diffguard.diffusion.schedules import Steps, trailing_schedule
from diffguard.errors import SettingError


def test_grid_of_ten_levels_is_the_documented_one():
    alpha_bar = torch.linspace(0.999, 0.001, 1000)
    schedule = trailing_schedule(alpha_bar, 10)
    assert schedule.inversion.timestep.tolist() == [49, 99, 199, 299, 399, 499, 599, 699, 799, 899]
    assert schedule.denoising.timestep.tolist() == [99, 199, 299, 399, 499, 599, 699, 799, 899, 999]
    assert schedule.inversion.alpha_bar_from[0] == schedule.denoising.alpha_bar_to[0] == 1
    assert torch.equal(schedule.inversion.alpha_bar_to, alpha_bar.double()[99::100])
    assert torch.equal(schedule.denoising.alpha_bar_from, schedule.inversion.alpha_bar_to)


@pytest.mark.parametrize("levels", [0, 3, 1000])
def test_grid_refuses_levels_that_make_no_even_strides(levels):
    with pytest.raises(SettingError, match="levels"):
        trailing_schedule(torch.linspace(0.999, 0.001, 1000), levels)


def test_a_move_is_the_step_of_diffusers_own_ddim_scheduler():
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    schedule = trailing_schedule(scheduler.alphas_cumprod, 10)
    x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for move in (9, 4, 1):
        theirs = scheduler.step(eps, int(schedule.denoising.timestep[move]), x).prev_sample
        at = Coefficients.of(schedule.denoising, torch.full((4,), move), x)
        assert torch.allclose(ddim_update(predict_x0(x, eps, at), eps, at), theirs, atol=1e-5)


def test_eps_and_x0_imply_each_other():
    x, eps = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha_bar = torch.tensor([0.3, 0.2], dtype=torch.float64)
    at = Coefficients.of(Steps(torch.tensor([499]), alpha_bar[:1], alpha_bar[1:]), torch.zeros(4, dtype=torch.long), x)
    assert torch.allclose(predict_eps(x, predict_x0(x, eps, at), at), eps, atol=1e-5)


@pytest.mark.parametrize("direction", ["down", "up"])
def test_second_order_moves_are_those_of_diffusers_dpm_solver(direction):
    """Its multistep schedulers have a whole batch at one place; there ours are the same."""
    kind = DPMSolverMultistepScheduler if direction == "down" else DPMSolverMultistepInverseScheduler
    theirs = kind(beta_schedule="squaredcos_cap_v2", algorithm_type="dpmsolver++", solver_order=2)
    theirs.set_timesteps(10)
    # The same places as a schedule of ours, whose index grows with the noise.
    alpha_bar, timesteps = 1 / (1 + theirs.sigmas.double() ** 2), theirs.timesteps
    leaves, reaches = alpha_bar[:-1], alpha_bar[1:]
    if direction == "down":
        timesteps, leaves, reaches = timesteps.flip(0), leaves.flip(0), reaches.flip(0)
    moves = Steps(timesteps, leaves, reaches)
    x = expected = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    earlier = None
    # Upward, their very last move is of first order again.
    for step, timestep in enumerate(theirs.timesteps[:9]):
        k = torch.full((3,), 9 - step if direction == "down" else step)
        assert torch.equal(moves.timestep[k], timestep.expand(3))
        expected = theirs.step(torch.sin(expected), timestep, expected).prev_sample
        never = torch.zeros(3, dtype=torch.bool)
        x, earlier = ddim_step(x, torch.sin(x), moves, k, clip=never, prev_x0=earlier, has_prev=~never)
        assert torch.allclose(x, expected, rtol=1e-3, atol=1e-4), step
    first_order = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(9):
        k = torch.full((3,), 9 - step if direction == "down" else step)
        first_order, _ = ddim_step(first_order, torch.sin(first_order), moves, k, clip=never)
    assert not torch.allclose(first_order, expected, rtol=1e-2)
