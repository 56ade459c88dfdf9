"""Takes the steps of trajectories, group by group, and decides where each trajectory goes on.

Steps that share a sampler and a gradient are taken together, by `diffguard.engine.arithmetic`.
"""

from collections import defaultdict
from functools import partial
from itertools import repeat
from operator import add

from diffguard.diffusion.sampler import Sampler
from diffguard.engine.arithmetic import StepArithmetic
from diffguard.engine.plan import Plan, ReconstructionKey, StepGroup
from diffguard.engine.pool import LatentPool
from diffguard.engine.queue import EvaluationQueue
from diffguard.engine.single_steps import SingleSteps
from diffguard.engine.trajectory import ImageState, Measurement, Node, Step, Trajectory
from diffguard.engine.types import Stats
from diffguard.utils.known import known
from diffguard.utils.memory import MemorySafeBatches


class Stepper:
    """Takes the steps whose noise is there, and queues the ones that follow.

    Attributes:
        finished: images that have no open steps any more; whoever collects them empties it.
        completed: how many images are finished, collected or not.
    """

    def __init__(
        self,
        plan: Plan,
        samplers: list[Sampler],
        pool: LatentPool,
        queue: EvaluationQueue,
        single_steps: SingleSteps,
        batches: MemorySafeBatches,
        stats: Stats,
    ) -> None:
        self.finished: list[ImageState] = []
        self.completed = 0
        self._plan, self._samplers, self._pool, self._queue = plan, samplers, pool, queue
        self._single_steps, self._batches, self._stats = single_steps, batches, stats
        self._arithmetic = StepArithmetic(plan, samplers, pool)
        self._deferred: dict[StepGroup, list[Step]] = {}

    def advance(self, steps: list[Step | Measurement]) -> None:
        """Take steps by group; those under classifier guidance are deferred until there are enough of them."""
        groups: defaultdict[StepGroup, list[Step]] = defaultdict(list)
        measurements = []
        for step in steps:
            if isinstance(step, Measurement):
                measurements.append(step)
            else:
                groups[step.trajectory.group].append(step)
        if measurements:
            self._finish(self._single_steps.collect(measurements))
        for group, members in groups.items():
            if group.gradient is None:
                self._batches.run(partial(self._take, group), members)
            else:
                self._deferred.setdefault(group, []).extend(members)

    @property
    def deferred(self) -> int:
        """How many steps of one group are deferred, at the most."""
        return max(map(len, self._deferred.values()), default=0)

    def advance_deferred(self) -> None:
        """Take as many deferred steps of the largest group as there are slots."""
        group, members = max(self._deferred.items(), key=lambda item: len(item[1]))
        part = members[: self._batches.size]
        del members[: self._batches.size]
        self._batches.run(partial(self._take, group), part)

    def _take(self, group: StepGroup, steps: list[Step]) -> None:
        """Take steps of one group. If memory ends none of them is taken: states change after `put_all` only."""
        is_multistep = self._samplers[group.sampler].solver != "ddim"
        x, eps = self._arithmetic.inputs(steps)
        x, x0 = self._arithmetic.step(group, steps, x, eps)
        fired = self._arithmetic.fired_rules(group, steps, x)
        rows = [row for row, step in enumerate(steps) if step.trajectory.path is not None]
        path_eps = eps if len(rows) == len(steps) else eps[rows]
        terms = self._arithmetic.path_terms_of(group, [steps[row] for row in rows], path_eps) if rows else []
        latents, estimates, noise = self._pool.put_all([x, x0 if is_multistep else x[:0], path_eps])
        if group.gradient is not None:
            self._stats.gradients += len(steps)
        for row, term, index in zip(rows, terms, noise, strict=True):
            trajectory = steps[row].trajectory
            trajectory.path = tuple(map(add, known(trajectory.path), term))
            self._pool.release(trajectory.prev_eps)
            trajectory.prev_eps = index
        nodes = [Node(step.node.image, index) for step, index in zip(steps, latents, strict=True)]
        for row, rule in fired:
            trajectory = steps[row].trajectory
            for request in trajectory.active_rules.pop(rule):
                self._stop(trajectory, nodes[row], steps[row].k + 1, request)
        x0_indices = estimates if is_multistep else repeat(None, len(steps))
        for step, node, x0_index in zip(steps, nodes, x0_indices, strict=True):
            self._complete(step, node, x0_index)

    def _complete(self, step: Step, node: Node, x0: int | None) -> None:
        """Go on from the node that a step has led to, and release what is behind it."""
        trajectory, start = step.trajectory, step.node
        is_inversion = trajectory.is_inversion
        if trajectory.active_rules if is_inversion else step.k:
            self._queue.add(trajectory.step(node, step.k + 1 if is_inversion else step.k - 1, x0))
        else:
            self._pool.release(x0)
            self._end(trajectory, node)
        self._pool.release(step.prev_x0)
        start.open_steps -= 1
        if not start.open_steps:
            self._pool.release_all((start.latents, *start.eps.values()))

    def _stop(self, trajectory: Trajectory, node: Node, level: int, request: int) -> None:
        """Start the reconstructions of a request whose inversion stops at a node, or take its path."""
        image, schedule = node.image, self._samplers[trajectory.group.sampler].schedule
        image.stopped_at[request] = level
        if not self._plan.requests[request].variant.reconstructs:
            image.paths[request] = known(trajectory.path)
            return
        keys = self._plan.reconstructions(
            request,
            image.label(request, self._plan.classifier_of[request]),
            level,
            schedule.levels,
            with_unconditional=image.sample.unconditional,
        )
        image.reconstructions[request] = keys
        for key in [*keys.conditional, keys.unconditional]:
            if key is not None and key not in image.ends:
                image.ends[key] = None
                image.open_trajectories += 1
                group, labels = self._plan.group(key), self._plan.network_labels(key.conditioning)
                timesteps = schedule.denoising.timesteps
                reconstruction = Trajectory(key, False, group, timesteps, trajectory.precision, labels)
                self._queue.add(reconstruction.step(node, key.start))

    def _end(self, trajectory: Trajectory, node: Node) -> None:
        """A trajectory ends at a node: a reconstruction is kept there; of an inversion nothing is needed any more."""
        image = node.image
        if isinstance(trajectory.key, ReconstructionKey):
            image.ends[trajectory.key] = node.latents
        else:
            self._pool.release(trajectory.reference)
            self._pool.release(trajectory.prev_eps)
            if not node.open_steps:  # no reconstruction starts here
                self._pool.release(node.latents)
        image.open_trajectories -= 1
        if not image.open_trajectories:
            self._finish([image])

    def _finish(self, images: list[ImageState]) -> None:
        self.finished += images
        self.completed += len(images)
