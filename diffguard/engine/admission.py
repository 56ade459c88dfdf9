"""How images enter the engine: encoded, classified, with their CAM masks, at the start of every inversion they need."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count, islice

import torch
from torch import Tensor

from diffguard.diffusion.path_statistics import PATH_STATISTICS
from diffguard.diffusion.sampler import Sampler
from diffguard.distances.functions import check_distances
from diffguard.engine.plan import InversionKey, MaskKey, Plan
from diffguard.engine.pool import LatentPool, int64
from diffguard.engine.queue import EvaluationQueue
from diffguard.engine.single_steps import SingleSteps
from diffguard.engine.trajectory import ImageState, Node, Trajectory
from diffguard.engine.types import Sample
from diffguard.errors import DataError
from diffguard.models.classifiers.base import predict_logits
from diffguard.models.denoisers.base import Denoiser
from diffguard.models.gradcam import cam_mask
from diffguard.utils.memory import MemorySafeBatches


class Admission:
    """Reads samples ahead, a batch at a time, and starts one image after the other.

    Args:
        samplers: filled when the first image tells the size of all.

    Attributes:
        started: how many images were.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        samplers: list[Sampler],
        pool: LatentPool,
        queue: EvaluationQueue,
        single_steps: SingleSteps,
        batches: MemorySafeBatches,
    ) -> None:
        self.started = 0
        self._denoiser, self._plan, self._samplers = denoiser, plan, samplers
        self._pool, self._queue, self._single_steps, self._batches = pool, queue, single_steps, batches
        self._waiting: deque[ImageState] = deque()
        self._order = count()
        self._shape: torch.Size | None = None

    def has_next(self, source: Iterator[Sample]) -> bool:
        """Whether there is another image; reads some ahead if none is waiting."""
        if not self._waiting:
            self._batches.run(self._read, list(islice(source, self._batches.size)))
        return bool(self._waiting)

    def start_next(self) -> None:
        """Start the image that has waited longest."""
        self._start(self._waiting.popleft())

    def _read(self, samples: list[Sample]) -> None:
        """Encode and classify images, and make the masks of their guidance, before their turn comes."""
        for sample in samples:
            self._check_shape(sample)
        if not self._samplers:
            self._make_samplers(samples[0].image.shape[-1])
        pixels = torch.stack([sample.image for sample in samples]).to(self._denoiser.device)
        latents: dict[str, Tensor] = {}
        for variant, sampler in zip(self._plan.sampler_variants, self._samplers, strict=True):
            if variant.process_method not in latents:
                latents[variant.process_method] = sampler.encode(pixels)
        logits = [predict_logits(classifier, pixels) for classifier in self._plan.classifiers]
        predicted = torch.stack([values.argmax(dim=1) for values in logits], dim=1).tolist()
        is_finite = torch.stack([values.isfinite().all(dim=1) for values in logits], dim=1).tolist()
        images = []
        for row, sample in enumerate(samples):
            own_latents = {method: values[row : row + 1] for method, values in latents.items()}
            image = ImageState(next(self._order), sample, pixels[row], predicted[row], is_finite[row], own_latents)
            images.append(image)
        self._make_masks(images, pixels, next(iter(latents.values())).shape[-2:])
        self._waiting.extend(images)

    def _make_masks(self, images: Sequence[ImageState], pixels: Tensor, size: Sequence[int]) -> None:
        """Give each image the masks that its requests need, one batch for each classifier and cut."""
        wanted: dict[tuple[int, float], dict[tuple[int, MaskKey], None]] = {}
        for row, image in enumerate(images):
            for request in self._wanted(image):
                label = image.label(request, self._plan.classifier_of[request])
                for conditioning in self._plan.conditionings(request, label):
                    if (mask := conditioning.mask) is not None:
                        wanted.setdefault((mask.classifier, mask.cut), {})[row, mask] = None
        for (classifier, cut), pairs in wanted.items():
            rows = [row for row, _ in pairs]
            labels = int64([mask.label for _, mask in pairs], pixels.device)
            masks = cam_mask(self._plan.classifiers[classifier], pixels[rows], labels, cut, (size[0], size[1]))
            for (row, key), mask in zip(pairs, masks, strict=True):
                images[row].masks[key] = mask

    def _wanted(self, image: ImageState) -> Sequence[int]:
        return range(len(self._plan.requests)) if image.sample.wanted is None else image.sample.wanted

    def _start(self, image: ImageState) -> None:
        """Start every inversion that the image's requests need, and queue the evaluations of those that need none."""
        self.started += 1
        trajectories: dict[InversionKey, Trajectory] = {}
        nodes: dict[tuple[str, str], Node] = {}
        for request in self._wanted(image):
            variant = self._plan.requests[request].variant
            # Nodes are not shared across precisions: the noise that is kept at one is of one precision.
            place = (variant.process_method, variant.precision)
            if place not in nodes:
                nodes[place] = Node(image, self._pool.put(image.latents[variant.process_method])[0])
            node = nodes[place]
            if variant.is_single_step:
                self._single_steps.start(request, node)
                continue
            key = self._plan.inversion(request, image.label(request, self._plan.classifier_of[request]))
            if key not in trajectories:
                sampler = self._samplers[key.sampler]
                image.open_trajectories += 1
                trajectories[key] = Trajectory(
                    key,
                    True,
                    self._plan.group(key),
                    sampler.schedule.inversion.timesteps,
                    sampler.precision,
                    self._plan.network_labels(key.conditioning),
                    reference=self._pool.hold(node.latents),
                )
                self._queue.add(trajectories[key].step(node, 0))
            trajectory = trajectories[key]
            trajectory.active_rules.setdefault(self._plan.rule_of[request], []).append(request)
            if not variant.reconstructs:
                trajectory.path = (0.0,) * PATH_STATISTICS
        for node in nodes.values():
            if not node.open_steps:  # only noisy images are made of it
                self._pool.release(node.latents)
        image.latents = {}

    def _check_shape(self, sample: Sample) -> None:
        """Check that an image is square, of the denoiser's channels, and of the size of those before.

        Raises:
            DataError: it is not.
        """
        shape, (channels, side, _) = sample.image.shape, self._denoiser.image_shape
        if len(shape) != 3 or shape[0] != channels or shape[1] != shape[2]:
            raise DataError(
                f"image {sample.key} is {tuple(shape)}, the denoiser takes square ones ({channels}, {side}, {side})"
            )
        self._shape = self._shape or shape
        if shape != self._shape:
            raise DataError(f"image {sample.key} is {tuple(shape)}, the ones before are {tuple(self._shape)}")

    def _make_samplers(self, side: int) -> None:
        """Make the samplers for images of this side in pixels, which stepper and results share.

        Raises:
            DataError: a variant does not bring images of this size to the denoiser's.
            SettingError: they are too small for a distance.
        """
        for request in self._plan.requests:
            check_distances(request.variant.distances, side)
        self._samplers += [Sampler.of(variant, self._denoiser, side) for variant in self._plan.sampler_variants]
