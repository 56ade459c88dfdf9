"""The scoring engine: many images at once, each at a noise level of its own, and network calls that are full.

Inversion takes an image to the levels where its variants stop it, and from each of them it is reconstructed under
every label and guidance that is wanted. All these steps evaluate one network, which takes a timestep and a label for
each sample; so a call takes whatever is pending, of any image in any phase (continuous batching). The oldest image
goes first, and a new one is admitted when a call would not be full. An evaluation is of (latents, timestep, label);
each is made once, whichever variants need it. A variant that scores the inversion path needs no reconstruction.

The parts, a module each: `types` is what comes in and goes out, `plan` says in keys what requests need, `admission`
lets images in, `queue` holds pending evaluations and calls the network, `stepper` takes the steps whose noise is there
(by the formulas in `arithmetic`), `single_steps` measures what needs no trajectory, `results` turns finished images
into scores. `trajectory` is what they pass on, `pool` where latents are, `tuning` how the network is called.
`processes` runs several engines side by side, `batch` scores one batch, `cost` counts without scoring.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from diffguard.diffusion.sampler import Sampler
from diffguard.engine.admission import Admission
from diffguard.engine.plan import Plan
from diffguard.engine.pool import LatentPool
from diffguard.engine.queue import EvaluationQueue
from diffguard.engine.results import Results
from diffguard.engine.single_steps import SingleSteps
from diffguard.engine.stepper import Stepper
from diffguard.engine.tuning import Tuning, tune
from diffguard.engine.types import Request, Sample, ScoreResult, Stats, check_request, resolved_request
from diffguard.models.denoisers.base import Denoiser
from diffguard.utils.memory import MemorySafeBatches
from diffguard.utils.processor import flushed_denormals


class Engine:
    """Scores images under several requests, with full batches.

    Args:
        denoiser: on the device where the images are to be scored.
        requests: variants with their thresholds set. Those that agree share inversions and reconstructions.
        slots: evaluations in a network call, or all of how it is called; None: `tune` measures.
        fixed: fill calls that lack images, so that every batch has one shape, as compiled networks
            and CUDA graphs want it; None: on a GPU.

    Attributes:
        stats: what it has cost so far.

    Raises:
        SettingError: a variant does not suit the denoiser or its classifier.

    Example:
        >>> engine = Engine(denoiser, [Request(classifier, variant)])  # doctest: +SKIP
        >>> for key, results in engine.run(Sample(i, x) for i, x in enumerate(images)):  # doctest: +SKIP
        ...     print(key, results[0].score)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        requests: Sequence[Request],
        *,
        slots: int | Tuning | None = None,
        fixed: bool | None = None,
    ) -> None:
        for request in requests:
            check_request(request, denoiser)
        requests = [resolved_request(request, denoiser.device) for request in requests]
        self.stats = Stats()
        if slots is None:
            slots = tune(denoiser, requests[0].variant.precision if requests else "float32")
        flushes = isinstance(slots, Tuning) and slots.flushes_denormals
        self._denormals = partial(flushed_denormals, denoiser.device) if flushes else nullcontext
        size = slots.slots if isinstance(slots, Tuning) else slots
        self._batches = MemorySafeBatches(size, denoiser.device)
        self._pool = LatentPool()
        plan = Plan(requests, denoiser.num_labels, denoiser.null_label)
        samplers: list[Sampler] = []  # made when the first image tells its size
        fixed = denoiser.device.type == "cuda" if fixed is None else fixed
        self._queue = EvaluationQueue(denoiser, self._pool, self._batches, self.stats, fixed=fixed)
        single_steps = SingleSteps(plan, samplers, self._pool, self._queue, self._batches)
        self._stepper = Stepper(plan, samplers, self._pool, self._queue, single_steps, self._batches, self.stats)
        self._admission = Admission(denoiser, plan, samplers, self._pool, self._queue, single_steps, self._batches)
        self._results = Results(plan, samplers, self._pool, self._batches)

    @property
    def slots(self) -> int:
        """Evaluations in a network call; fewer once memory was not enough."""
        return self._batches.size

    @torch.no_grad()
    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[Hashable, dict[int, ScoreResult]]]:
        """Score samples; each comes out with its key when it is finished, not in the order of admission.

        After an error, or if the iteration is abandoned, make a new engine: images are still at work in this one.

        Yields:
            (key, results by the index of their request).

        Raises:
            DataError: images are not of the denoiser's shape, or not all of one size.
            SettingError: they are too small for a distance.
        """
        source = iter(samples)
        while True:
            self._admit(source)
            if not self._queue.longest:
                break
            precision, batch = self._queue.next_batch()
            with self._denormals():
                ready = self._queue.evaluate(precision, batch)
            self._stepper.advance(ready)
            if len(self._stepper.finished) >= self.slots:
                yield from self._collect()
        yield from self._collect()

    def _admit(self, source: Iterator[Sample]) -> None:
        """Fill the next call: by deferred steps, which then have evaluations pending, and by new images.

        Deferred are steps under classifier guidance, until there are as many as slots, or nothing else is left to do.
        At most twice as many images as slots are at work.
        """
        while True:
            if self._stepper.deferred >= self.slots:
                self._stepper.advance_deferred()
            elif self._queue.longest >= self.slots:
                return
            elif self._at_work < 2 * self.slots and self._admission.has_next(source):
                self._admission.start_next()
            elif self._stepper.deferred:
                self._stepper.advance_deferred()
            else:
                return

    @property
    def _at_work(self) -> int:
        return self._admission.started - self._stepper.completed

    def _collect(self) -> Iterator[tuple[Hashable, dict[int, ScoreResult]]]:
        finished, self._stepper.finished = self._stepper.finished, []
        yield from self._results.collect(finished)
