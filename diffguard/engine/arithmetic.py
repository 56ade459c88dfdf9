"""Steps that share a sampler and a gradient, as one batch for the formulas of `diffguard.diffusion`.

Nothing here changes a state.
"""

from collections import defaultdict
from itertools import compress

import torch
from torch import Tensor

from diffguard.diffusion.ddim import ddim_step
from diffguard.diffusion.early_stop import compares_at, is_unlike, last_level
from diffguard.diffusion.guidance import CleanGradient, mix_eps
from diffguard.diffusion.path_statistics import path_terms
from diffguard.diffusion.sampler import Sampler
from diffguard.engine.plan import MaskKey, Plan, ReconstructionKey, StepGroup
from diffguard.engine.pool import LatentPool, int64
from diffguard.engine.trajectory import Step, Trajectory
from diffguard.settings import AdaptiveStop
from diffguard.utils.known import known


class StepArithmetic:
    """Guidance, the DDIM step, stop rules and path terms of one group of steps."""

    def __init__(self, plan: Plan, samplers: list[Sampler], pool: LatentPool) -> None:
        self._plan, self._samplers, self._pool = plan, samplers, pool
        self._gradients: dict[int, CleanGradient] = {}

    def inputs(self, steps: list[Step]) -> tuple[Tensor, Tensor]:
        """The latents of each step, and the noise there, under classifier-free guidance where it has that."""
        latents = [step.node.latents for step in steps]
        own = [step.node.eps[step.evaluations[-1]] for step in steps]
        null = [step.node.eps[step.evaluations[0]] for step in steps]
        if null == own:
            x, eps = self._pool.get_all([latents, own])
            return x, eps
        # Of a step with one evaluation both are the same, and their difference is 0.
        x, eps_null, eps = self._pool.get_all([latents, null, own])
        conditionings = [step.trajectory.conditioning for step in steps]
        scale = torch.tensor([conditioning.scale for conditioning in conditionings], dtype=eps.dtype)
        scale = scale.to(eps.device).view(-1, *[1] * (eps.ndim - 1))
        mask = _masks(steps, [conditioning.mask for conditioning in conditionings], eps)
        return x, mix_eps(eps_null, eps, scale, mask)

    def step(self, group: StepGroup, steps: list[Step], x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """`ddim_step` of one group: the latents at the next level, and x0."""
        sampler = self._samplers[group.sampler]
        schedule = sampler.schedule
        indices = [step.k if step.trajectory.is_inversion else schedule.levels + step.k for step in steps]
        k, clip = int64(indices), sampler.clip
        is_clipped = clip if not clip or 0 not in indices else k > 0  # the published first step is not clamped
        guide = prev_x0 = has_prev = None
        if group.gradient is not None:
            steps_before = int64([_start_of(step.trajectory) - step.k for step in steps])
            targets = int64([step.trajectory.conditioning.target for step in steps], x.device)
            guide = self._gradient(group.gradient).at(steps_before, targets)
        if sampler.solver != "ddim":
            # Where there is no previous step the latents stand in for its x0: `has_prev` leaves them out.
            prev_x0 = self._pool.get([step.node.latents if step.prev_x0 is None else step.prev_x0 for step in steps])
            has_prev = torch.tensor([step.prev_x0 is not None for step in steps])
        return ddim_step(x, eps, schedule.both, k, clip=is_clipped, guide=guide, prev_x0=prev_x0, has_prev=has_prev)

    def _gradient(self, index: int) -> CleanGradient:
        if index not in self._gradients:
            key = self._plan.gradients[index]
            classifier = self._plan.classifiers[key.classifier]
            self._gradients[index] = self._samplers[key.sampler].clean_gradient(key.guidance, classifier)
        return self._gradients[index]

    def fired_rules(self, group: StepGroup, steps: list[Step], x: Tensor) -> list[tuple[int, int]]:
        """(row, rule), in order, of the active stop rules that fire where these steps lead."""
        fired, compared = [], defaultdict[int, list[int]](list)
        for row, step in enumerate(steps):
            level = step.k + 1
            for rule in step.trajectory.active_rules:
                stop = self._plan.rules[rule].stop
                if level == last_level(stop):
                    fired.append((row, rule))
                elif compares_at(stop, level):
                    compared[rule].append(row)
        for rule, rows in compared.items():
            unlike = self._is_unlike(rule, group, x[int64(rows, x.device)], [steps[row] for row in rows])
            fired += [(row, rule) for row in compress(rows, unlike.tolist())]
        return sorted(fired)

    def _is_unlike(self, rule: int, group: StepGroup, x: Tensor, steps: list[Step]) -> Tensor:
        """Whether an adaptive rule stops the inversions whose steps led to x, bool [B]."""
        stop, classifier_index = self._plan.rules[rule]
        assert isinstance(stop, AdaptiveStop)
        classifier = self._plan.classifiers[classifier_index or 0]  # any, if the rule looks through none
        sampler = self._samplers[group.sampler]
        similarities = {name: sampler.similarity(name, classifier) for name in stop.thresholds}
        reference = self._pool.get([known(step.trajectory.reference) for step in steps])
        return is_unlike(stop, x, reference, similarities)

    def path_terms_of(self, group: StepGroup, steps: list[Step], eps: Tensor) -> list[list[float]]:
        """What each of these steps, with its noise, adds to its path's statistics."""
        # Before the first step there is nothing to differ from; any finite values do.
        previous = [
            step.node.latents if step.trajectory.prev_eps is None else step.trajectory.prev_eps for step in steps
        ]
        gap = self._samplers[group.sampler].gaps[int64([step.k for step in steps])]
        return path_terms(eps, self._pool.get(previous), gap).tolist()


def _masks(steps: list[Step], keys: list[MaskKey | None], x: Tensor) -> Tensor | None:
    """Where guidance acts, [B, 1, ...]; None: everywhere."""
    rows = [row for row, key in enumerate(keys) if key is not None]
    if not rows:
        return None
    masks = torch.stack([steps[row].node.image.masks[known(keys[row])] for row in rows])
    return torch.ones_like(x[:, :1]).index_copy_(0, int64(rows, x.device), masks)


def _start_of(trajectory: Trajectory) -> int:
    assert isinstance(trajectory.key, ReconstructionKey)
    return trajectory.key.start
