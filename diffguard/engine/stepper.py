"""Takes the steps of trajectories, group by group, and decides where each trajectory goes on.

Steps that share a direction, a sampler and a gradient are taken together, by `diffguard.engine.arithmetic`.
"""

from functools import partial

from diffguard.diffusion.sampler import Sampler
from diffguard.engine.arithmetic import StepArithmetic
from diffguard.engine.plan import Plan, ReconstructionKey
from diffguard.engine.pool import LatentPool
from diffguard.engine.queue import EvaluationQueue
from diffguard.engine.trajectory import ImageState, Node, Step, StepGroup, Trajectory
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
        batches: MemorySafeBatches,
        stats: Stats,
    ) -> None:
        self.finished: list[ImageState] = []
        self.completed = 0
        self._plan, self._samplers, self._pool, self._queue = plan, samplers, pool, queue
        self._batches, self._stats = batches, stats
        self._arithmetic = StepArithmetic(plan, samplers, pool)
        self._deferred: dict[StepGroup, list[Step]] = {}

    def advance(self, steps: list[Step]) -> None:
        """Take steps by group; those under classifier guidance are deferred until there are enough of them."""
        groups: dict[StepGroup, list[Step]] = {}
        for step in steps:
            groups.setdefault(step.trajectory.group, []).append(step)
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
        eps = self._arithmetic.guided_eps(steps)
        x, x0 = self._arithmetic.step(group, steps, eps)
        fired = self._arithmetic.fired_rules(group, steps, x) if group.is_inversion else []
        rows = [row for row, step in enumerate(steps) if step.trajectory.path is not None]
        path_eps = eps[rows]
        terms = self._arithmetic.path_terms_of(group, [steps[row] for row in rows], path_eps) if rows else []
        latents, estimates, noise = self._pool.put_all([x, x0 if is_multistep else x[:0], path_eps])
        if group.gradient is not None:
            self._stats.gradients += len(steps)
        for row, rule in fired:
            steps[row].stopping += steps[row].trajectory.active_rules.pop(rule)
        for row, term, index in zip(rows, terms, noise, strict=True):
            trajectory = steps[row].trajectory
            trajectory.path = tuple(total + more for total, more in zip(known(trajectory.path), term, strict=True))
            self._pool.release(trajectory.prev_eps)
            trajectory.prev_eps = index
        for row, step in enumerate(steps):
            x0_index = estimates[row] if is_multistep else None
            self._complete(step, Node(step.node.image, latents[row]), x0_index)

    def _complete(self, step: Step, node: Node, x0: int | None) -> None:
        """Go on from the node that a step has led to, and release what is behind it."""
        trajectory, image = step.trajectory, step.node.image
        for request in step.stopping:
            self._stop(trajectory, node, step.k + 1, request)
        next_k = step.k + 1 if trajectory.is_inversion else step.k - 1
        goes_on = bool(trajectory.active_rules) if trajectory.is_inversion else next_k >= 0
        if goes_on:
            self._queue.add(trajectory.step(node, next_k, prev_x0=x0))
        else:
            self._pool.release(x0)
            self._end(trajectory, node)
        self._pool.release(step.prev_x0)
        step.node.open_steps -= 1
        if not step.node.open_steps:
            for index in (step.node.latents, *step.node.eps.values()):
                self._pool.release(index)
        image.open_steps -= 1
        if not image.open_steps:
            self.finished.append(image)
            self.completed += 1

    def _stop(self, trajectory: Trajectory, node: Node, level: int, request: int) -> None:
        """Start the reconstructions of a request whose inversion stops at a node, or take its path."""
        image, schedule = node.image, self._samplers[trajectory.sampler].schedule
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
                labels = self._plan.network_labels(key.conditioning)
                reconstruction = Trajectory(key, schedule.denoising, trajectory.precision, labels)
                self._queue.add(reconstruction.step(node, key.start))

    def _end(self, trajectory: Trajectory, node: Node) -> None:
        """A trajectory ends at a node: a reconstruction is kept there; of an inversion nothing is needed any more."""
        if isinstance(trajectory.key, ReconstructionKey):
            node.image.ends[trajectory.key] = node.latents
            return
        self._pool.release(trajectory.reference)
        self._pool.release(trajectory.prev_eps)
        if not node.open_steps:  # no reconstruction starts here
            self._pool.release(node.latents)
