"""Scores of single evaluations: denoising errors under labels, and activations inside the network.

Neither needs a trajectory, so that everything an image is evaluated for is queued when it is admitted, but for labels
that are given up on the way. Errors are kept by noisy image and label: whichever requests need one, it is taken once.
"""

from collections.abc import Sequence

import torch

from diffguard.diffusion.denoising_errors import (
    LEAST_PAIRS,
    add_noise,
    content_of,
    denoising_error,
    hopeless,
    paired_noise,
)
from diffguard.diffusion.sampler import Sampler
from diffguard.engine.plan import NoiseKey, Plan
from diffguard.engine.pool import LatentPool
from diffguard.engine.queue import EvaluationQueue
from diffguard.engine.trajectory import QUEUED, Capture, Comparison, ImageState, Measurement, Node
from diffguard.settings import ACTIVATIONS
from diffguard.utils.known import known
from diffguard.utils.memory import MemorySafeBatches


class SingleSteps:
    """Queues the evaluations that an image's score is made of, and collects what they bring."""

    def __init__(
        self,
        plan: Plan,
        samplers: list[Sampler],
        pool: LatentPool,
        queue: EvaluationQueue,
        batches: MemorySafeBatches,
    ) -> None:
        self._plan, self._samplers, self._pool, self._queue, self._batches = plan, samplers, pool, queue, batches

    def start(self, request: int, node: Node) -> None:
        """Queue what a request evaluates of an image.

        Args:
            node: of the image's own latents.
        """
        image, variant = node.image, self._plan.requests[request].variant
        sampler = self._samplers[self._plan.sampler_of[request]]
        image.open_trajectories += 1
        if variant.distance == ACTIVATIONS:
            evaluation = (sampler.schedule.inversion.timesteps[0], self._plan.unconditional.label)
            capture = Capture(request, sampler.precision, variant.activation_gaussian.block)
            node.captures[evaluation, capture.block] = None
            self._queue.add(Measurement(capture, node, [evaluation]))
            return
        label = image.label(request, self._plan.classifier_of[request])
        labels = self._plan.compared_labels(request, label)
        comparison = Comparison(request, sampler.precision, self._pool.hold(node.latents), labels)
        image.comparisons[request] = comparison
        self._go_on(image, comparison)

    def collect(self, measurements: list[Measurement]) -> list[ImageState]:
        """Take what evaluations have brought; returns the images of which nothing is open any more."""
        comparing = [measurement for measurement in measurements if isinstance(measurement.owner, Comparison)]
        self._batches.run(self._take_errors, comparing)
        finished = []
        for measurement in measurements:
            image, owner = measurement.node.image, measurement.owner
            if isinstance(owner, Capture):
                image.activations[owner.request] = known(
                    measurement.node.captures[measurement.evaluations[0], owner.block]
                )
                self._close(measurement)
            else:
                assert isinstance(owner, Comparison)
                owner.open_steps -= 1
                self._close(measurement)
                if owner.open_steps or self._go_on(image, owner):
                    continue
                self._pool.release(owner.latents)
            image.stopped_at[owner.request] = 0
            image.open_trajectories -= 1
            if not image.open_trajectories:
                finished.append(image)
        return finished

    def _go_on(self, image: ImageState, comparison: Comparison) -> bool:
        """Queue the next noisy images of a comparison; returns whether anything is open."""
        noisy_images = self._plan.noisy_images[comparison.request]
        prune = self._plan.requests[comparison.request].variant.denoising_errors.prune
        # Labels are given up one noisy image after the other, once there are enough.
        while comparison.queued < len(noisy_images) and not comparison.open_steps:
            count = len(noisy_images)
            if prune is not None:
                self._give_up(image, comparison, prune)
                count = 1 if comparison.queued else LEAST_PAIRS
            keys = [key for key, _ in noisy_images[comparison.queued : comparison.queued + count]]
            comparison.queued += len(keys)
            self._queue_errors(image, comparison, keys)
        return comparison.open_steps > 0

    def _give_up(self, image: ImageState, comparison: Comparison, limit: float) -> None:
        """Leave out labels that have no hope; never its own, of which the score is."""
        pairs = self._plan.noisy_images[comparison.request][: comparison.queued]
        if not pairs:
            return
        errors = [[image.errors[key, label] for key, _ in pairs] for label in comparison.labels]
        weights = torch.tensor([weight for _, weight in pairs])
        is_hopeless = hopeless(torch.tensor(errors), weights, limit).tolist()
        comparison.labels = [label for row, label in enumerate(comparison.labels) if row == 0 or not is_hopeless[row]]

    def _queue_errors(self, image: ImageState, comparison: Comparison, keys: Sequence[NoiseKey]) -> None:
        """Queue the errors that are not known yet, at these noisy images."""
        needed = {key: [label for label in comparison.labels if (key, label) not in image.errors] for key in keys}
        self._make_noisy(image, comparison, [key for key in keys if needed[key] and key not in image.noisy])
        ready: list[Measurement] = []
        for key, labels in needed.items():
            if not labels:
                continue
            timestep = self._samplers[key.sampler].schedule.denoising.timesteps[key.level - 1]
            node, _ = image.noisy[key]
            measurement = Measurement(comparison, node, [(timestep, label) for label in labels], key)
            comparison.open_steps += 1
            if all(node.eps.get(evaluation, QUEUED) != QUEUED for evaluation in measurement.evaluations):
                node.open_steps += 1
                ready.append(measurement)  # another request has waited for each, and is not collected yet
            else:
                self._queue.add(measurement)
        if ready:
            self._take_errors(ready)
            for measurement in ready:
                comparison.open_steps -= 1
                self._close(measurement)

    def _make_noisy(self, image: ImageState, comparison: Comparison, keys: list[NoiseKey]) -> None:
        if not keys:
            return
        latents = self._pool.get([comparison.latents])
        image.content = image.content or content_of(image.pixels)
        steps = self._samplers[keys[0].sampler].schedule.denoising
        noise = torch.stack(
            [
                paired_noise(image.content, key.seed, key.draw, steps.timesteps[key.level - 1], latents.shape[1:])
                for key in keys
            ]
        ).to(latents)
        alpha_bar = steps.alpha_bar_from[[key.level - 1 for key in keys]]
        noisy, indices = self._pool.put_all([add_noise(latents, noise, alpha_bar), noise])
        for key, index, noise_index in zip(keys, noisy, indices, strict=True):
            image.noisy[key] = Node(image, index), noise_index

    def _take_errors(self, measurements: list[Measurement]) -> None:
        """Note the errors of these steps' evaluations."""
        pairs = [(measurement, evaluation) for measurement in measurements for evaluation in measurement.evaluations]
        if not pairs:
            return
        predicted = [measurement.node.eps[evaluation] for measurement, evaluation in pairs]
        drawn = [measurement.node.image.noisy[known(measurement.noise)][1] for measurement, _ in pairs]
        errors = denoising_error(*self._pool.get_all([predicted, drawn])).tolist()
        for (measurement, (_, label)), error in zip(pairs, errors, strict=True):
            measurement.node.image.errors[known(measurement.noise), label] = error

    def _close(self, measurement: Measurement) -> None:
        """Let go of a measurement's node, and of its noise, if no other measurement needs them."""
        node = measurement.node
        node.open_steps -= 1
        if node.open_steps:
            return
        self._pool.release_all((node.latents, *node.eps.values()))
        if measurement.noise is not None:
            _, noise = node.image.noisy.pop(measurement.noise)
            self._pool.release(noise)
