"""An image at work: the nodes that its trajectories pass, and the steps between them.

A node is latents at a noise level. Each step starts at a node and waits there for the noise that it needs; steps of
several trajectories may start at one node. Latents and noise are indices of the `LatentPool`.
"""

from dataclasses import dataclass, field

from torch import Tensor

from diffguard.engine.plan import (
    Conditioning,
    InversionKey,
    MaskKey,
    NoiseKey,
    ReconstructionKey,
    Reconstructions,
    StepGroup,
)
from diffguard.engine.types import Sample

Evaluation = tuple[int, int]
"""One evaluation of the network at a node: its timestep and label."""

QUEUED = -1
"""In place of the pool index of noise that is not there yet."""


@dataclass(eq=False, slots=True)
class ImageState:
    """An image at work.

    Attributes:
        order: of admission.
        pixels: [C, H, W], on the device.
        predicted: its label by each classifier.
        is_finite: whether each classifier's logits are finite.
        latents: its own [1, ...], by process_method; empty once it is at work.
        masks: [1, h, w] of the latents' size.
        open_trajectories: inversions and reconstructions that have not ended.
        ends: pool indices of the latents at which its reconstructions ended; None: under way.
        stopped_at: by request, the level where its inversion stopped.
        reconstructions: by request, what it reconstructs from there.
        paths: by request that scores it, its path's statistics.
        content: what decides its noise; empty until that is drawn.
        errors: denoising errors that are known, by noisy image and label.
        noisy: noisy images at work, with the pool index of their noise.
        comparisons: by request, what denoising errors it compares.
        activations: by request that scores them, the denoiser's pooled activations [C].
    """

    order: int
    sample: Sample
    pixels: Tensor
    predicted: list[int]
    is_finite: list[bool]
    latents: dict[str, Tensor]
    masks: dict[MaskKey, Tensor] = field(default_factory=dict)
    open_trajectories: int = 0
    ends: dict[ReconstructionKey, int | None] = field(default_factory=dict)
    stopped_at: dict[int, int] = field(default_factory=dict)
    reconstructions: dict[int, Reconstructions] = field(default_factory=dict)
    paths: dict[int, tuple[float, ...]] = field(default_factory=dict)
    content: bytes = b""
    errors: dict[tuple[NoiseKey, int], float] = field(default_factory=dict)
    noisy: dict[NoiseKey, tuple["Node", int]] = field(default_factory=dict)
    comparisons: dict[int, "Comparison"] = field(default_factory=dict)
    activations: dict[int, Tensor] = field(default_factory=dict)

    def label(self, request: int, classifier: int) -> int:
        """The label that a request guides to: the sample's own for it, or its classifier's prediction."""
        return self.sample.labels.get(request, self.predicted[classifier])


@dataclass(eq=False, slots=True)
class Node:
    """Latents of an image at a noise level, the noise predicted there, and the steps that wait for it.

    Attributes:
        latents: index in the pool.
        eps: by evaluation, the index of its noise in the pool, or `QUEUED`; absent: nobody needs it.
        waiting: steps that start here and lack noise.
        open_steps: steps that start here and are not taken yet.
        captures: by evaluation and block of the network, its pooled output [C] in that evaluation; None: not there
            yet. There are none where nobody needs them.
    """

    image: ImageState
    latents: int
    eps: dict[Evaluation, int] = field(default_factory=dict)
    waiting: list["Step | Measurement"] = field(default_factory=list)
    open_steps: int = 0
    captures: dict[tuple[Evaluation, str], Tensor | None] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Trajectory:
    """One inversion of an image, or one reconstruction.

    Attributes:
        is_inversion: or a reconstruction.
        group: with which of other trajectories' steps its own are taken.
        timesteps: of the steps of its direction, by their index in the schedule.
        precision: that the network is evaluated in.
        labels: under which the network is evaluated at each step.
        reference: of an inversion, the image's own latents, with which stop rules compare.
        active_rules: of an inversion, by index those that have not fired, with the requests that have them.
        path: the path's statistics so far, of an inversion of which a request scores them; None elsewhere.
        prev_eps: the noise of the previous step, where the path counts.
    """

    key: InversionKey | ReconstructionKey
    is_inversion: bool
    group: StepGroup
    timesteps: list[int]
    precision: str
    labels: tuple[int, ...]
    reference: int | None = None
    active_rules: dict[int, list[int]] = field(default_factory=dict)
    path: tuple[float, ...] | None = None
    prev_eps: int | None = None

    @property
    def conditioning(self) -> Conditioning:
        return self.key.conditioning

    def step(self, node: Node, k: int, prev_x0: int | None = None) -> "Step":
        """Its step at index k, from a node."""
        timestep = self.timesteps[k]
        return Step(self, node, k, [(timestep, label) for label in self.labels], prev_x0)


@dataclass(eq=False, slots=True)
class Comparison:
    """The denoising errors of an image that one request compares under several labels.

    Attributes:
        precision: that the network is evaluated in.
        latents: pool index of the image's own latents.
        labels: under which the next noisy images are evaluated; its own is the first.
        queued: how many noisy images have been, so far.
    """

    request: int
    precision: str
    latents: int
    labels: list[int]
    queued: int = 0
    open_steps: int = 0


@dataclass(eq=False, slots=True)
class Capture:
    """The activations of an image that one request scores."""

    request: int
    precision: str
    block: str


@dataclass(eq=False, slots=True)
class Step:
    """One step of a trajectory, from a node, at index k of the schedule.

    Attributes:
        evaluations: that it needs at its node; the last is the conditioning's own.
        prev_x0: x0 of the previous step, for a solver of second order.
    """

    trajectory: Trajectory
    node: Node
    k: int
    evaluations: list[Evaluation]
    prev_x0: int | None = None

    @property
    def precision(self) -> str:
        return self.trajectory.precision


@dataclass(eq=False, slots=True)
class Measurement:
    """Evaluations at a node that are a score's own: no step is taken.

    Attributes:
        noise: of the noisy image that the node is, where errors are measured.
    """

    owner: Comparison | Capture
    node: Node
    evaluations: list[Evaluation]
    noise: NoiseKey | None = None

    @property
    def precision(self) -> str:
        return self.owner.precision
