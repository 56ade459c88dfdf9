"""Steps that share a direction, a sampler and a gradient, as one batch for the formulas of `diffguard.diffusion`.

Nothing here changes a state.
"""

from itertools import compress

import torch
from torch import Tensor

from diffguard.diffusion.ddim import ddim_step
from diffguard.diffusion.early_stop import stops_here
from diffguard.diffusion.guidance import CleanGradient, mix_eps
from diffguard.diffusion.path_statistics import path_terms
from diffguard.diffusion.sampler import Sampler
from diffguard.engine.plan import GradientKey, Plan, ReconstructionKey
from diffguard.engine.pool import LatentPool
from diffguard.engine.trajectory import Step, StepGroup, Trajectory
from diffguard.settings import AdaptiveStop
from diffguard.utils.known import known


class StepArithmetic:
    """Guidance, the DDIM step, stop rules and path terms of one group of steps."""

    def __init__(self, plan: Plan, samplers: list[Sampler], pool: LatentPool) -> None:
        self._plan, self._samplers, self._pool = plan, samplers, pool
        self._gradients: dict[GradientKey, CleanGradient] = {}

    def guided_eps(self, steps: list[Step]) -> Tensor:
        """The noise of each step, under classifier-free guidance where its conditioning has that."""
        eps = self._pool.get([known(step.node.eps[step.evaluations[-1]]) for step in steps])
        if all(len(step.evaluations) == 1 for step in steps):
            return eps
        # Of a step with one evaluation both are the same, and their difference is 0.
        eps_null = self._pool.get([known(step.node.eps[step.evaluations[0]]) for step in steps])
        scales = [step.trajectory.conditioning.scale for step in steps]
        scale = torch.tensor(scales, dtype=eps.dtype, device=eps.device).view(-1, *[1] * (eps.ndim - 1))
        return mix_eps(eps_null, eps, scale, _masks(steps, eps))

    def step(self, group: StepGroup, steps: list[Step], eps: Tensor) -> tuple[Tensor, Tensor]:
        """`ddim_step` of one group: the latents at the next level, and x0."""
        sampler = self._samplers[group.sampler]
        x = self._pool.get([step.node.latents for step in steps])
        k = torch.tensor([step.k for step in steps])
        clip = torch.full_like(k, sampler.clip, dtype=torch.bool)
        if group.is_inversion:
            clip &= k > 0  # the published first step of inversion is not clamped
        guide = None
        if group.gradient is not None:
            steps_before = torch.tensor([_start_of(step.trajectory) - step.k for step in steps])
            targets = torch.tensor([step.trajectory.conditioning.target for step in steps], device=x.device)
            guide = self._gradient(group.gradient).at(steps_before, targets)
        prev_x0 = None
        # Where there is no previous step the latents stand in for its x0: `has_prev` leaves them out.
        if sampler.solver != "ddim":
            prev_x0 = self._pool.get([step.node.latents if step.prev_x0 is None else step.prev_x0 for step in steps])
        has_prev = torch.tensor([step.prev_x0 is not None for step in steps])
        direction = sampler.schedule.inversion if group.is_inversion else sampler.schedule.denoising
        return ddim_step(x, eps, direction, k, clip=clip, guide=guide, prev_x0=prev_x0, has_prev=has_prev)

    def _gradient(self, key: GradientKey) -> CleanGradient:
        if key not in self._gradients:
            classifier = self._plan.classifiers[key.classifier]
            self._gradients[key] = self._samplers[key.sampler].clean_gradient(key.guidance, classifier)
        return self._gradients[key]

    def fired_rules(self, group: StepGroup, steps: list[Step], x: Tensor) -> list[tuple[int, int]]:
        """(row, rule) of the active stop rules that fire where these steps of inversion lead."""
        sampler = self._samplers[group.sampler]
        level = torch.tensor([step.k + 1 for step in steps])
        reference = self._pool.get([known(step.trajectory.reference) for step in steps])
        fired = []
        for rule in dict.fromkeys(rule for step in steps for rule in step.trajectory.active_rules):
            stop, classifier_index = self._plan.rules[rule]
            classifier = self._plan.classifiers[classifier_index or 0]  # any, if the rule looks through none
            names = stop.thresholds if isinstance(stop, AdaptiveStop) else {}
            similarities = {name: sampler.similarity(name, classifier) for name in names}
            rows = [row for row, step in enumerate(steps) if rule in step.trajectory.active_rules]
            stopped = stops_here(stop, level[rows], x[rows], reference[rows], similarities)
            fired += [(row, rule) for row in compress(rows, stopped.tolist())]
        return fired

    def path_terms_of(self, group: StepGroup, steps: list[Step], eps: Tensor) -> list[list[float]]:
        """What each of these steps, with its noise, adds to its path's statistics."""
        # Before the first step there is nothing to differ from; any finite values do.
        previous = [
            step.node.latents if step.trajectory.prev_eps is None else step.trajectory.prev_eps for step in steps
        ]
        gap = self._samplers[group.sampler].gaps[[step.k for step in steps]]
        return path_terms(eps, self._pool.get(previous), gap).tolist()


def _masks(steps: list[Step], x: Tensor) -> Tensor | None:
    """Where guidance acts, [B, 1, ...]; None: everywhere."""
    keys = [step.trajectory.conditioning.mask for step in steps]
    if all(key is None for key in keys):
        return None
    everywhere = torch.ones_like(x[0, :1])
    return torch.stack(
        [everywhere if key is None else step.node.image.masks[key] for step, key in zip(steps, keys, strict=True)]
    )


def _start_of(trajectory: Trajectory) -> int:
    assert isinstance(trajectory.key, ReconstructionKey)
    return trajectory.key.start
