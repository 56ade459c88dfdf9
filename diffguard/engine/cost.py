"""What a variant costs: how often it asks the denoiser's network."""

import torch

from diffguard.diffusion.schedules import GRIDS
from diffguard.settings import AllLabels, LabelGuidance, NoGuidance, Variant


def network_evaluations(variant: Variant, level: int, train_steps: int, num_labels: int, null_label: bool) -> int:
    """How often an image whose inversion stops at a level asks the network, under this variant alone.

    Args:
        level: the number of inversion steps; of a variant that does not stop adaptively, its `stop`.
        train_steps: of the denoiser, the length of its `alphas_cumprod`.
        num_labels: that it knows.
        null_label: whether it also predicts noise without a label.

    Example:
        >>> variant = Variant(stop=4, guidance=LabelGuidance(scale=2), distance="l1")
        >>> network_evaluations(variant, level=4, train_steps=1000, num_labels=6, null_label=True)
        12
    """

    def asks(scale: float, masked: bool) -> int:
        return 2 if null_label and scale != 0 and (scale != 1 or masked) else 1

    grid = GRIDS[variant.grid](torch.linspace(0.999, 0.001, train_steps), variant.levels)
    start = grid.start(torch.tensor(level), variant.forback_skip_diff, variant.skip_first_steps)
    up = level * (1 if variant.inversion_scale is None else asks(variant.inversion_scale, False))
    if not variant.reconstructs:
        return up
    down = int(start) + 1
    guidance = variant.guidance
    # Of one denoising move: how often it asks, and whether also without a label.
    if isinstance(guidance, AllLabels):
        each, without = num_labels, False
    elif isinstance(guidance, LabelGuidance):
        each = asks(guidance.scale, guidance.cam_cut is not None)
        without = each == 2
    else:
        each, without = 1, True
    made = each * down
    plain = isinstance(guidance, NoGuidance) or (not isinstance(guidance, AllLabels) and guidance.scale == 0)
    if variant.against == "unconditional" and not plain:
        # Both reconstructions leave the same latents, where what is asked without a label serves both.
        made += down - int(without)
    return up + made
