"""Pending evaluations of the network: each once, the oldest image's first, in full batches."""

import heapq
from collections import defaultdict
from itertools import count

from diffguard.engine.pool import LatentPool, int64
from diffguard.engine.trajectory import QUEUED, Evaluation, Node, Step
from diffguard.engine.types import Stats
from diffguard.models.denoisers.base import Denoiser, in_precision
from diffguard.utils.memory import MemorySafeBatches

Pending = tuple[int, int, Node, Evaluation]
"""(order of the image, order of the evaluation, node, evaluation): an entry of a heap."""


class EvaluationQueue:
    """Evaluations that steps wait for, and the calls of the network that bring them.

    Args:
        batches: as many evaluations as there are slots go into a call.
        fixed: fill calls that lack evaluations, so that every batch has one shape.
    """

    def __init__(
        self, denoiser: Denoiser, pool: LatentPool, batches: MemorySafeBatches, stats: Stats, *, fixed: bool
    ) -> None:
        self._denoiser, self._pool, self._batches, self._stats, self._fixed = denoiser, pool, batches, stats, fixed
        self._pending: defaultdict[str, list[Pending]] = defaultdict(list)
        self._order = count()

    @property
    def longest(self) -> int:
        """How many evaluations of one precision are pending, at the most."""
        return max(map(len, self._pending.values()), default=0)

    def add(self, step: Step) -> None:
        """Let a step wait at its node, and queue what nobody has queued there yet."""
        node = step.node
        node.waiting.append(step)
        node.open_steps += 1
        for evaluation in step.evaluations:
            if evaluation not in node.eps:
                node.eps[evaluation] = QUEUED
                pending = self._pending[step.trajectory.precision]
                heapq.heappush(pending, (node.image.order, next(self._order), node, evaluation))

    def next_batch(self) -> tuple[str, list[tuple[Node, Evaluation]]]:
        """The precision of which most is pending, and as many of its evaluations as there are slots."""
        precision, pending = max(self._pending.items(), key=lambda item: len(item[1]))
        return precision, [heapq.heappop(pending)[2:] for _ in range(min(self._batches.size, len(pending)))]

    def evaluate(self, precision: str, batch: list[tuple[Node, Evaluation]]) -> list[Step]:
        """Evaluate the network; returns the steps that now have all their noise."""
        denoiser = in_precision(self._denoiser, precision)

        def call(part: list[tuple[Node, Evaluation]]) -> None:
            slots = self._batches.size
            filled = part + [part[-1]] * (slots - len(part)) if self._fixed else part
            x = self._pool.get([node.latents for node, _ in filled])
            timestep = int64([timestep for _, (timestep, _) in filled], x.device)
            label = int64([label for _, (_, label) in filled], x.device)
            eps = denoiser.eps(x, timestep, label)
            for (node, evaluation), index in zip(part, self._pool.put(eps[: len(part)]), strict=True):
                node.eps[evaluation] = index
            self._stats.calls += 1
            self._stats.evaluations += len(part)
            self._stats.capacity += slots

        self._batches.run(call, batch)
        return [step for node in dict.fromkeys(node for node, _ in batch) for step in _take_ready(node)]


def _take_ready(node: Node) -> list[Step]:
    """The steps of a node that wait for nothing any more."""
    ready, eps = node.waiting, node.eps
    if QUEUED in eps.values():
        ready = [step for step in ready if all(eps[evaluation] != QUEUED for evaluation in step.evaluations)]
        node.waiting = [step for step in node.waiting if step not in ready]
    else:
        node.waiting = []
    return ready
