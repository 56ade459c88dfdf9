"""What a variant costs: how often it evaluates the denoiser's network."""

from typing import Any

import torch

from diffguard.diffusion.schedules import SCHEDULES
from diffguard.engine.plan import Plan
from diffguard.engine.types import Request
from diffguard.settings import Variant


def network_evaluations(variant: Variant, level: int, train_steps: int, num_labels: int, null_label: bool) -> int:
    """How often an image whose inversion stops at a level evaluates the network, under this variant alone.

    Args:
        level: the number of inversion steps; of a variant that does not stop adaptively, its `stop`. Of one that
            inverts nothing it does not count; of labels that it may give up, none is.
        train_steps: of the denoiser, the length of its `alphas_cumprod`.
        num_labels: that it knows.
        null_label: whether it also predicts noise without a label.

    Example:
        >>> from diffguard.settings import LabelGuidance
        >>> variant = Variant(stop=4, guidance=LabelGuidance(scale=2), distance="l1")
        >>> network_evaluations(variant, level=4, train_steps=1000, num_labels=6, null_label=True)
        12
    """
    classifier: Any = None  # of which nothing is needed to count
    plan = Plan([Request(classifier, variant)], num_labels, num_labels if null_label else None)
    if variant.is_single_step:
        # Activations are of one evaluation, and of no noisy image.
        return len(plan.noisy_images[0]) * len(plan.compared_labels(0, label=0)) or 1
    inversion = plan.inversion(0, label=0)
    # An evaluation is of latents and a label: the latents of trajectory and step, or those where all of them start.
    evaluations = {(inversion, k, label) for k in range(level) for label in plan.network_labels(inversion.conditioning)}
    if variant.reconstructs:
        levels = SCHEDULES[variant.grid](torch.linspace(0.999, 0.001, train_steps), variant.levels).levels
        conditional, unconditional = plan.reconstructions(0, 0, level, levels)
        for key in [*conditional, unconditional] if unconditional is not None else conditional:
            for k in range(key.start + 1):
                latents = (None, k) if k == key.start else (key, k)
                evaluations |= {(*latents, label) for label in plan.network_labels(key.conditioning)}
    return len(evaluations)
