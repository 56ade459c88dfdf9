"""Pending evaluations of the network: each once, the oldest image's first, in full batches."""

import heapq
from collections import defaultdict
from contextlib import ExitStack
from itertools import count

import torch
from torch import Tensor

from diffguard.diffusion.activations import captured
from diffguard.engine.pool import LatentPool, int64
from diffguard.engine.trajectory import QUEUED, Evaluation, Measurement, Node, Step
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

    def add(self, step: Step | Measurement) -> None:
        """Let a step wait at its node, and queue what nobody has queued there yet."""
        node = step.node
        node.waiting.append(step)
        node.open_steps += 1
        for evaluation in step.evaluations:
            if evaluation not in node.eps:
                node.eps[evaluation] = QUEUED
                pending = self._pending[step.precision]
                heapq.heappush(pending, (node.image.order, next(self._order), node, evaluation))

    def next_batch(self) -> tuple[str, list[tuple[Node, Evaluation]]]:
        """The precision of which most is pending, and as many of its evaluations as there are slots."""
        precision, pending = max(self._pending.items(), key=lambda item: len(item[1]))
        return precision, [heapq.heappop(pending)[2:] for _ in range(min(self._batches.size, len(pending)))]

    def evaluate(self, precision: str, batch: list[tuple[Node, Evaluation]]) -> list[Step | Measurement]:
        """Evaluate the network; returns the steps that now have all their noise."""
        denoiser = in_precision(self._denoiser, precision)

        def call(part: list[tuple[Node, Evaluation]]) -> None:
            slots = self._batches.size
            filled = part + [part[-1]] * (slots - len(part)) if self._fixed else part
            x = self._pool.get([node.latents for node, _ in filled])
            timestep = int64([timestep for _, (timestep, _) in filled], x.device)
            label = int64([label for _, (_, label) in filled], x.device)
            eps = self._eps_with_captures(denoiser, x, timestep, label, part)
            for (node, evaluation), index in zip(part, self._pool.put(eps[: len(part)]), strict=True):
                node.eps[evaluation] = index
            self._stats.calls += 1
            self._stats.evaluations += len(part)
            self._stats.capacity += slots

        self._batches.run(call, batch)
        return [step for node in dict.fromkeys(node for node, _ in batch) for step in _take_ready(node)]

    def _eps_with_captures(
        self, denoiser: Denoiser, x: Tensor, timestep: Tensor, label: Tensor, part: list[tuple[Node, Evaluation]]
    ) -> Tensor:
        """The noise that the network predicts; what its blocks output meanwhile is kept where a node wants it."""
        wanted: dict[str, list[int]] = {}
        for row, (node, evaluation) in enumerate(part):
            for of_evaluation, block in node.captures:
                if of_evaluation == evaluation:
                    wanted.setdefault(block, []).append(row)
        with ExitStack() as stack:
            outputs = {block: stack.enter_context(captured(denoiser, block)) for block in wanted}
            eps = denoiser.eps(x, timestep, label)
        for block, rows in wanted.items():
            values = torch.cat(outputs[block]).cpu()  # on the device they would wait there for the image's end
            for row in rows:
                node, evaluation = part[row]
                node.captures[evaluation, block] = values[row]
        return eps


def _take_ready(node: Node) -> list[Step | Measurement]:
    """The steps of a node that wait for nothing any more."""
    ready, eps = node.waiting, node.eps
    if QUEUED in eps.values():
        ready = [step for step in ready if all(eps[evaluation] != QUEUED for evaluation in step.evaluations)]
        node.waiting = [step for step in node.waiting if step not in ready]
    else:
        node.waiting = []
    return ready
