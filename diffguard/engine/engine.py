"""The scoring engine: many images at once, each at a place of its own, and network calls that are full.

An image walks up in noise until its variants' stop rules have fired, and from each place where one
fired down again, under every label and guidance that is wanted there. All these moves ask one network,
which takes a timestep and a label for each sample; so a call takes whatever is ready, of any image in
any phase (continuous batching). The oldest image goes first, and a new one enters when a call would not
be full. What is asked is a (state, timestep, label); each is evaluated once, whichever variants need it.
A request that scores the inversion path needs no way down: on the way up its sums grow
move by move.

`Engine.run` is the loop. Its parts, in order: `_enter` (images come in), `_call` (the network),
`_depart` (moves that have their noise), `_leave` (distances, and the image goes out). The arithmetic is
`diffguard.diffusion.ddim.ddim_step`'s, the stop rules' is in `diffguard.diffusion.early_stop`.
"""

import heapq
import math
import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, count, islice
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from diffguard.diffusion.ddim import ddim_step
from diffguard.diffusion.early_stop import check_set, stops_here
from diffguard.diffusion.guidance import CleanGradient, asks_both, mix_eps
from diffguard.diffusion.path_statistics import path_score, path_terms
from diffguard.diffusion.sampler import Sampler
from diffguard.diffusion.schedules import GRIDS
from diffguard.distances.functions import check_distances, get_distance
from diffguard.errors import DataError, SettingError
from diffguard.models.classifiers.base import Classifier, predict_logits
from diffguard.models.denoisers.base import Denoiser, in_precision
from diffguard.models.gradcam import cam_mask
from diffguard.settings import AdaptiveStop, AllLabels, LabelGuidance, NoGuidance, Variant
from diffguard.utils.memory import Portions

T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """A variant, its thresholds set, for the images of one classifier."""

    classifier: Classifier
    variant: Variant


@dataclass(frozen=True)
class Sample:
    """One image to score.

    Attributes:
        key: comes back with what was found.
        image: [C, H, W] in [0, 1]; square, of the denoiser's size or, under a variant's
            process_method, another; the same for all.
        wanted: the requests to answer, by index; None: all.
        labels: by request, labels to guide to in place of the classifier's prediction.
        unconditional: the reconstruction without a label is wanted too.
    """

    key: Hashable
    image: Tensor
    wanted: Sequence[int] | None = None
    labels: Mapping[int, int] = field(default_factory=dict)
    unconditional: bool = False


@dataclass(frozen=True)
class Found:
    """What one request found of one image.

    Attributes:
        score: higher = more OOD.
        label: the classifier's prediction.
        level: the noise level at which the inversion stopped: its number of steps.
        reconstruction: [C, H, W] in [0, 1], under the label that decided the score; None if the variant
            makes none, or of pictures that were not kept.
        unconditional: [C, H, W] in [0, 1], from the same noise without a label; None if neither the
            sample nor the variant asked for it.
        path: the statistics of the inversion path, of a variant that scores them.
    """

    score: float
    label: int
    level: int
    reconstruction: Tensor | None
    unconditional: Tensor | None
    path: tuple[float, ...] | None = None

    def without_pictures(self) -> "Found":
        """The same figures; what is kept of many images."""
        return replace(self, reconstruction=None, unconditional=None)


@dataclass
class Stats:
    """What a run has cost.

    Attributes:
        calls: of the denoiser's network.
        evaluations: images in them, the sum of their batches.
        offered: what the batches could have held.
        gradients: images at which a guidance gradient was taken.
    """

    calls: int = 0
    evaluations: int = 0
    offered: int = 0
    gradients: int = 0

    @property
    def occupancy(self) -> float:
        """Share of the offered places that were used."""
        return self.evaluations / max(self.offered, 1)


class Recipe(NamedTuple):
    """How a reconstruction is made from its latents; equal ones are made once."""

    label: int
    scale: float = 1.0
    mask: tuple[int, int, float] | None = None  # classifier, label, cut
    gradient: CleanGradient | None = None
    toward: int = 0  # the gradient's label


@dataclass(eq=False)
class _Image:
    """An image at work.

    Attributes:
        predicted: label by classifier. unclassified: the classifiers whose logits are not all numbers.
        latents: of the image itself, by process_method.
        open: its moves that wait or are under way.
        made: latents of finished reconstructions, by (inversion, level, start, recipe).
        uses: by request, its level, its reconstructions, and the unconditional one's key or None.
        paths: by request that scores it, its level and its path's statistics.
    """

    order: int
    sample: Sample
    pixels: Tensor
    predicted: dict[int, int]
    latents: dict[str, Tensor]
    masks: dict[tuple[int, int, float], Tensor] = field(default_factory=dict)
    unclassified: set[int] = field(default_factory=set)
    open: int = 0
    made: dict[Hashable, tuple[Sampler, int] | None] = field(default_factory=dict)
    uses: dict[int, tuple[int, list[Hashable], Hashable | None]] = field(default_factory=dict)
    paths: dict[int, tuple[int, tuple[float, ...]]] = field(default_factory=dict)

    def label(self, index: int, request: Request) -> int:
        return self.sample.labels.get(index, self.predicted[id(request.classifier)])


@dataclass(eq=False)
class _State:
    """Latents somewhere on an image's way, the noise predicted there, and the moves that wait for it."""

    image: _Image
    x: int
    eps: dict[tuple[int, int], int | None] = field(default_factory=dict)
    waiting: list["_Move"] = field(default_factory=list)
    open: int = 0


@dataclass(eq=False)
class _Trip:
    """A way up, one inversion of an image, or down, one reconstruction.

    Attributes:
        start: index of the first move.
        reference: pool number of the image's own latents, which stop rules look at.
        rules: on the way up those that have not fired, with the requests that have them.
        path: the statistics up to here, on a way up of which a request scores them; None elsewhere.
        before: pool number of the noise of the last move, where the path counts.
    """

    up: bool
    key: Hashable
    sampler: Sampler
    recipe: Recipe
    start: int = 0
    reference: int = -1
    rules: dict["_Rule", list[int]] = field(default_factory=dict)
    path: tuple[float, ...] | None = None
    before: int | None = None


class _Rule(NamedTuple):
    """A stop rule; similarities may look through the classifier."""

    key: str
    classifier: int | None


@dataclass(eq=False)
class _Move:
    """One move of a trip, from a state, at index k; earlier: x0 of the move before, where it counts."""

    trip: _Trip
    state: _State
    k: int
    needs: tuple[tuple[int, int], ...]
    earlier: int | None
    turning: list[int] = field(default_factory=list)  # requests whose inversion ends where it leads

    @property
    def kind(self) -> tuple[bool, int, int]:
        """Moves of one kind are made together."""
        return self.trip.up, id(self.trip.sampler), id(self.trip.recipe.gradient)


class Engine:
    """Scores images under several requests, with full batches.

    Args:
        denoiser: on the device where the images are to be scored.
        requests: variants with their thresholds set. Those that agree share walks and reconstructions.
        slots: images in a network call; None: `pick_slots` measures.
        fixed: fill calls that lack images, so that every batch has one shape, as compiled networks
            and CUDA graphs want it; None: on a GPU.

    Raises:
        SettingError: a variant does not suit the denoiser or its classifier.

    Example:
        >>> engine = Engine(denoiser, [Request(classifier, variant)])  # doctest: +SKIP
        >>> for key, found in engine.run(Sample(i, x) for i, x in enumerate(images)):  # doctest: +SKIP
        ...     print(key, found[0].score)
    """

    def __init__(
        self,
        denoiser: Denoiser,
        requests: Sequence[Request],
        *,
        slots: int | None = None,
        fixed: bool | None = None,
    ) -> None:
        for request in requests:
            check_request(request, denoiser)
        self.denoiser = denoiser
        self.requests = list(requests)
        self.device = denoiser.device
        self._portions = Portions(pick_slots(denoiser) if slots is None else slots, self.device)
        self.fixed = self.device.type == "cuda" if fixed is None else fixed
        self.stats = Stats()
        self._null = denoiser.null_label or 0
        self._pool = _Pool()
        self._waiting: list[_Image] = []
        self._asked: dict[str, list[tuple[int, int, _State, tuple[int, int]]]] = {}
        self._pushed: dict[tuple[bool, int, int], list[_Move]] = {}
        self._finished: list[_Image] = []
        self._live = 0
        self._order = count()
        self._samplers: dict[Hashable, Sampler] = {}
        self._gradients: dict[Hashable, CleanGradient] = {}
        self._by_id = {id(request.classifier): request.classifier for request in requests}
        self._any = next(iter(self._by_id.values()))
        self._stops = {_rule(request).key: request.variant.stop for request in requests}
        self._shape: torch.Size | None = None

    @property
    def slots(self) -> int:
        """Images in a network call; fewer once memory has ended."""
        return self._portions.size

    @torch.no_grad()
    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[Hashable, dict[int, Found]]]:
        """Score samples; each comes out with its key when it is done, not in the order of entry.

        Yields:
            (key, what was found by the index of its request).

        Raises:
            DataError: images are not of the denoiser's shape, or not all of one size.
            SettingError: they are too small for a distance.
        """
        source = iter(samples)
        while True:
            self._enter(source)
            if not any(self._asked.values()):
                break
            for kind, moves in self._call().items():
                if moves[0].trip.recipe.gradient is None:
                    self._portions.each(self._depart, moves)
                else:
                    self._pushed.setdefault(kind, []).extend(moves)
            if len(self._finished) >= self.slots:
                yield from self._leave()
        yield from self._leave()

    # Images come in.

    def _enter(self, source: Iterator[Sample]) -> None:
        """See that the next call will be full: by moves that wait for a gradient, and by new images.

        Gradients are taken of as many images at once as there are slots, or when nothing else is left
        to do; meanwhile at most twice as many images are at work.
        """
        while True:
            pushed = max(self._pushed.values(), key=len, default=[])
            if len(pushed) < self.slots and max(map(len, self._asked.values()), default=0) >= self.slots:
                return
            if len(pushed) < self.slots and self._live < 2 * self.slots and not self._waiting:
                self._portions.each(self._read, list(islice(source, self.slots)))
                self._waiting.reverse()
            if len(pushed) < self.slots and self._live < 2 * self.slots and self._waiting:
                self._start(self._waiting.pop())
            elif pushed:
                part = pushed[: self.slots]
                del pushed[: self.slots]
                self._portions.each(self._depart, part)
            else:
                return

    def _read(self, samples: list[Sample]) -> None:
        """Encode and classify images, and see where their classifier looks, before their turn comes."""
        for sample in samples:
            self._check_image(sample)
        pixels = torch.stack([sample.image for sample in samples]).to(self.device)
        samplers = {r.variant.process_method: self._sampler(r.variant) for r in self.requests}
        latents = {method: sampler.encode(pixels) for method, sampler in samplers.items()}
        logits = {key: predict_logits(classifier, pixels) for key, classifier in self._by_id.items()}
        labels = {key: each.argmax(dim=1).tolist() for key, each in logits.items()}
        sound = {key: each.isfinite().all(dim=1).tolist() for key, each in logits.items()}
        images = []
        masks: dict[tuple[int, float], dict[tuple[int, int], None]] = {}
        for row, sample in enumerate(samples):
            predicted = {key: each[row] for key, each in labels.items()}
            own: dict[str, Tensor] = {method: each[row : row + 1] for method, each in latents.items()}
            image = _Image(next(self._order), sample, pixels[row], predicted, own)
            image.unclassified = {key for key, each in sound.items() if not each[row]}
            images.append(image)
            for index in self._wanted(image):
                if mask := self._recipes(image, index)[0].mask:
                    masks.setdefault((mask[0], mask[2]), {})[row, mask[1]] = None
        size = next(iter(latents.values())).shape[-2:]
        for (classifier, cut), pairs in masks.items():
            rows = [row for row, _ in pairs]
            toward = torch.tensor([label for _, label in pairs], device=self.device)
            made = cam_mask(self._by_id[classifier], pixels[rows], toward, cut, (size[0], size[1]))
            for (row, label), each in zip(pairs, made, strict=True):
                images[row].masks[classifier, label, cut] = each
        self._waiting += images

    def _wanted(self, image: _Image) -> Sequence[int]:
        return range(len(self.requests)) if image.sample.wanted is None else image.sample.wanted

    def _start(self, image: _Image) -> None:
        """Put an image at the foot of every inversion that its requests need."""
        self._live += 1
        trips: dict[Hashable, _Trip] = {}
        feet: dict[Hashable, _State] = {}
        for index in self._wanted(image):
            request = self.requests[index]
            variant, sampler = request.variant, self._sampler(request.variant)
            recipe = Recipe(self._null)
            if variant.inversion_scale is not None:
                recipe = self._toward(image.label(index, request), variant.inversion_scale)
            key = (_sampling(variant), recipe)
            if key not in trips:
                foot = (variant.process_method, variant.precision)
                if foot not in feet:
                    feet[foot] = _State(image, self._pool.put(image.latents[variant.process_method])[0])
                trips[key] = _Trip(True, key, sampler, recipe, reference=self._pool.hold(feet[foot].x))
                self._wait(trips[key], feet[foot], 0, None)
            trips[key].rules.setdefault(_rule(request), []).append(index)
            if not variant.reconstructs:
                trips[key].path = (0.0,) * 6
        image.latents = {}

    # What a request wants.

    def _sampler(self, variant: Variant) -> Sampler:
        assert self._shape is not None
        key = _sampling(variant)
        if key not in self._samplers:
            self._samplers[key] = Sampler.of(variant, self.denoiser, self._shape[-1])
        return self._samplers[key]

    def _recipes(self, image: _Image, index: int) -> list[Recipe]:
        """A request's reconstructions; more than one where the nearest is to count."""
        request = self.requests[index]
        label, guidance = image.label(index, request), request.variant.guidance
        if isinstance(guidance, AllLabels):
            return [Recipe(each) for each in range(self.denoiser.num_labels)]
        if isinstance(guidance, NoGuidance):
            return [Recipe(self._null)]
        if isinstance(guidance, LabelGuidance):
            mask = None if guidance.cam_cut is None else (id(request.classifier), label, guidance.cam_cut)
            return [self._toward(label, guidance.scale, mask)]
        if guidance.scale == 0:
            return [Recipe(self._null)]
        key = (_sampling(request.variant), guidance, id(request.classifier))
        if key not in self._gradients:
            self._gradients[key] = self._sampler(request.variant).clean_gradient(guidance, request.classifier)
        # The denoiser itself is unconditional there.
        return [Recipe(self._null, gradient=self._gradients[key], toward=label)]

    def _toward(self, label: int, scale: float, mask: tuple[int, int, float] | None = None) -> Recipe:
        if scale == 0:
            return Recipe(self._null)
        return Recipe(label, scale, mask)

    # The network.

    def _wait(self, trip: _Trip, state: _State, k: int, earlier: int | None) -> None:
        """Let a move wait at a state, and ask for the noise that nobody has asked for there."""
        sampler, recipe = trip.sampler, trip.recipe
        moves = sampler.grid.up if trip.up else sampler.grid.down
        timestep = int(moves.timestep[k])
        labels = [recipe.label]
        if asks_both(self.denoiser, recipe.scale, recipe.mask is not None):
            labels = [self._null, recipe.label]
        needs = tuple((timestep, label) for label in labels)
        state.waiting.append(_Move(trip, state, k, needs, earlier))
        state.open += 1
        state.image.open += 1
        for need in needs:
            if need not in state.eps:
                state.eps[need] = None
                asked = self._asked.setdefault(sampler.precision, [])
                heapq.heappush(asked, (state.image.order, next(self._order), state, need))

    def _call(self) -> dict[tuple[bool, int, int], list[_Move]]:
        """Ask the network once, and find the moves that have all their noise, by kind."""
        precision, asked = max(self._asked.items(), key=lambda item: len(item[1]))
        denoiser = in_precision(self.denoiser, precision)
        batch = [heapq.heappop(asked)[2:] for _ in range(min(self.slots, len(asked)))]

        def evaluate(part: list[tuple[_State, tuple[int, int]]]) -> None:
            filled = part + [part[-1]] * (self.slots - len(part)) if self.fixed else part
            x = self._pool.get([state.x for state, _ in filled])
            timestep, label = torch.tensor([need for _, need in filled]).to(self.device).unbind(dim=1)
            eps = denoiser.eps(x, timestep, label)
            for (state, need), number in zip(part, self._pool.put(eps[: len(part)]), strict=True):
                state.eps[need] = number
            self.stats.calls += 1
            self.stats.evaluations += len(part)
            self.stats.offered += self.slots

        self._portions.each(evaluate, batch)
        ready: dict[tuple[bool, int, int], list[_Move]] = {}
        for state in dict.fromkeys(state for state, _ in batch):
            lacking = {need for need, eps in state.eps.items() if eps is None}
            for move in state.waiting:
                if lacking.isdisjoint(move.needs):
                    ready.setdefault(move.kind, []).append(move)
            state.waiting = [move for move in state.waiting if not lacking.isdisjoint(move.needs)]
        return ready

    # Moves.

    def _depart(self, moves: list[_Move]) -> None:
        """Make moves of one kind whose noise is there."""
        eps = self._noise(moves)
        x, x0 = self._step(moves, eps)
        numbers = self._pool.put(x)
        multistep = moves[0].trip.sampler.solver != "ddim"
        estimates = self._pool.put(x0) if multistep else [None] * len(moves)
        if moves[0].trip.up:
            self._stop(moves, x)
            self._collect([(move, row) for row, move in enumerate(moves) if move.trip.path is not None], eps)
        for move, number, estimate in zip(moves, numbers, estimates, strict=True):
            self._arrive(move, number, estimate)

    def _noise(self, moves: list[_Move]) -> Tensor:
        """The noise of each move, under classifier-free guidance where its recipe has that."""
        eps = self._pool.get([_known(move.state.eps[move.needs[-1]]) for move in moves])
        if all(len(move.needs) == 1 for move in moves):
            return eps
        null = self._pool.get([_known(move.state.eps[move.needs[0]]) for move in moves])
        scale = torch.tensor([move.trip.recipe.scale for move in moves], dtype=eps.dtype, device=self.device)
        return mix_eps(null, eps, scale.view(-1, *[1] * (eps.ndim - 1)), self._masks(moves, eps))

    def _step(self, moves: list[_Move], eps: Tensor) -> tuple[Tensor, Tensor]:
        """`ddim_step` of moves that share a sampler, a direction and a gradient."""
        sampler, gradient = moves[0].trip.sampler, moves[0].trip.recipe.gradient
        x = self._pool.get([move.state.x for move in moves])
        k = torch.tensor([move.k for move in moves])
        clip = torch.full_like(k, sampler.clip, dtype=torch.bool)
        if moves[0].trip.up:
            clip &= k > 0  # as published
        guide = None
        if gradient is not None:
            made = torch.tensor([move.trip.start - move.k for move in moves])
            toward = torch.tensor([move.trip.recipe.toward for move in moves], device=self.device)
            guide = gradient.at(made, toward)
            self.stats.gradients += len(moves)
        earlier = None
        if sampler.solver != "ddim":
            earlier = self._pool.get([move.state.x if move.earlier is None else move.earlier for move in moves])
        known = torch.tensor([move.earlier is not None for move in moves])
        grid = sampler.grid.up if moves[0].trip.up else sampler.grid.down
        return ddim_step(x, eps, grid, k, clip=clip, guide=guide, earlier=earlier, known=known)

    def _masks(self, moves: list[_Move], x: Tensor) -> Tensor | None:
        """Where guidance acts, [B, 1, ...]; None: everywhere."""
        recipes = [move.trip.recipe for move in moves]
        if all(recipe.mask is None for recipe in recipes):
            return None
        everywhere = torch.ones_like(x[0, :1])
        masks = zip(moves, recipes, strict=True)
        return torch.stack([everywhere if r.mask is None else m.state.image.masks[r.mask] for m, r in masks])

    def _stop(self, moves: list[_Move], x: Tensor) -> None:
        """See which rules fire where these moves up lead, and turn there for the requests that have them."""
        sampler = moves[0].trip.sampler
        level = torch.tensor([move.k + 1 for move in moves])
        reference = self._pool.get([move.trip.reference for move in moves])
        for rule in dict.fromkeys(rule for move in moves for rule in move.trip.rules):
            rows = [row for row, move in enumerate(moves) if rule in move.trip.rules]
            stop, classifier = self._stops[rule.key], self._by_id.get(rule.classifier or 0, self._any)
            names = stop.thresholds if isinstance(stop, AdaptiveStop) else {}
            similarities = {name: sampler.similarity(name, classifier) for name in names}
            stopped = stops_here(stop, level[rows], x[rows], reference[rows], similarities)
            for row in compress(rows, stopped.tolist()):
                moves[row].turning += moves[row].trip.rules.pop(rule)

    def _collect(self, moves: list[tuple[_Move, int]], eps: Tensor) -> None:
        """Add moves up, each with its row of eps, to their paths' statistics; all or, if memory ends, none."""
        if not moves:
            return
        own = eps[torch.tensor([row for _, row in moves], device=self.device)]
        before = self._pool.get([m.state.x if m.trip.before is None else m.trip.before for m, _ in moves])
        gap = moves[0][0].trip.sampler.gaps[[move.k for move, _ in moves]]
        terms = path_terms(own, before, gap).tolist()
        for (move, _), term, number in zip(moves, terms, self._pool.put(own), strict=True):
            trip = move.trip
            trip.path = tuple(one + more for one, more in zip(_known(trip.path), term, strict=True))
            self._pool.free(trip.before)
            trip.before = number

    def _arrive(self, move: _Move, number: int, estimate: int | None) -> None:
        """Go on from where a move has led, and forget what it has left behind."""
        trip, old, state = move.trip, move.state, _State(move.state.image, number)
        for index in move.turning:
            self._turn(trip, state, move.k + 1, index)
        if trip.up and trip.rules:
            self._wait(trip, state, move.k + 1, estimate)
        elif not trip.up and move.k:
            self._wait(trip, state, move.k - 1, estimate)
        else:
            self._pool.free(estimate)
            if trip.up:
                self._pool.free(trip.reference)
                self._pool.free(trip.before)
                if not state.open:  # no way down begins here
                    self._pool.free(number)
            else:
                state.image.made[trip.key] = (trip.sampler, number)
        self._pool.free(move.earlier)
        old.open -= 1
        if not old.open:
            for each in (old.x, *old.eps.values()):
                self._pool.free(each)
        old.image.open -= 1
        if not old.image.open:
            self._live -= 1
            self._finished.append(old.image)

    def _turn(self, trip: _Trip, state: _State, level: int, index: int) -> None:
        """Start the reconstructions of a request whose inversion has ended at a state, or take its path."""
        if not self.requests[index].variant.reconstructs:
            state.image.paths[index] = (level, _known(trip.path))
            return
        image, variant, grid = state.image, self.requests[index].variant, trip.sampler.grid
        start = int(grid.start(torch.tensor(level), variant.forback_skip_diff, variant.skip_first_steps))
        recipes = self._recipes(image, index)
        without = variant.against == "unconditional" or image.sample.unconditional
        keys = [(trip.key, level, start, recipe) for recipe in (*recipes, Recipe(self._null))]
        for key in keys if without else keys[:-1]:
            if key not in image.made:
                image.made[key] = None
                self._wait(_Trip(False, key, trip.sampler, key[-1], start), state, start, None)
        image.uses[index] = (level, list(keys[:-1]), keys[-1] if without else None)

    # Images go out.

    def _leave(self) -> Iterator[tuple[Hashable, dict[int, Found]]]:
        """Measure the distances of images that are done."""
        done: list[tuple[Hashable, dict[int, Found]]] = []
        self._portions.each(lambda part: done.extend(self._measure(part)), self._finished)
        self._finished = []
        yield from done

    def _measure(self, images: list[_Image]) -> list[tuple[Hashable, dict[int, Found]]]:
        pictures = self._decode(images)
        found: list[dict[int, Found]] = [{} for _ in images]
        for index, request in enumerate(self.requests):
            if not request.variant.reconstructs:
                self._measure_paths(images, index, found)
                continue
            rows = [row for row, image in enumerate(images) if index in image.uses]
            if not rows:
                continue
            distance, against = get_distance(request.variant.distance), request.variant.against
            pairs = [(row, key) for row in rows for key in images[row].uses[index][1]]
            without = {row: pictures.get((row, images[row].uses[index][2])) for row in rows}
            made = torch.stack([pictures[pair] for pair in pairs])
            references = [without[row] if against == "unconditional" else images[row].pixels for row, _ in pairs]
            scores = distance(torch.stack([_known(each) for each in references]), made, request.classifier)
            # As many reconstructions of each image as of any other.
            score, nearest = scores.view(len(rows), -1).min(dim=1)
            for row, value, which in zip(rows, score.tolist(), nearest.tolist(), strict=True):
                level, keys, _ = images[row].uses[index]
                label = images[row].predicted[id(request.classifier)]
                # Of logits that are no numbers the largest is none, and what was made under it is no score.
                value = math.nan if id(request.classifier) in images[row].unclassified else value
                found[row][index] = Found(value, label, level, pictures[row, keys[which]], without[row])
        for image in images:
            for each in image.made.values():
                self._pool.free(_known(each)[1])
        return [(image.sample.key, each) for image, each in zip(images, found, strict=True)]

    def _measure_paths(self, images: list[_Image], index: int, found: list[dict[int, Found]]) -> None:
        """What a request that scores inversion paths found of these images, into ``found``."""
        request = self.requests[index]
        rows = [row for row, image in enumerate(images) if index in image.paths]
        paths = torch.tensor([images[row].paths[index][1] for row in rows], dtype=torch.float64).view(-1, 6)
        for row, score in zip(rows, path_score(_known(request.variant.path), paths).tolist(), strict=True):
            level, path = images[row].paths[index]
            label = images[row].predicted[id(request.classifier)]
            score = math.nan if id(request.classifier) in images[row].unclassified else score
            found[row][index] = Found(score, label, level, None, None, path)

    def _decode(self, images: list[_Image]) -> dict[tuple[int, Hashable], Tensor]:
        """Every reconstruction of these images, in [0, 1], by (row, key)."""
        places: dict[int, list[tuple[int, Hashable]]] = {}
        for row, image in enumerate(images):
            for key, made in image.made.items():
                places.setdefault(id(_known(made)[0]), []).append((row, key))
        pictures: dict[tuple[int, Hashable], Tensor] = {}
        for alike in places.values():
            for first in range(0, len(alike), self.slots):
                part = alike[first : first + self.slots]
                made_here = [_known(images[row].made[key]) for row, key in part]
                latents = self._pool.get([number for _, number in made_here])
                pictures |= dict(zip(part, made_here[0][0].decode(latents), strict=True))
        return pictures

    def _check_image(self, sample: Sample) -> None:
        shape, (channels, side, _) = sample.image.shape, self.denoiser.image_shape
        if len(shape) != 3 or shape[0] != channels or shape[1] != shape[2]:
            raise DataError(
                f"image {sample.key} is {tuple(shape)}, the denoiser takes square ones ({channels}, {side}, {side})"
            )
        if self._shape is None:
            self._shape = shape
            for request in self.requests:
                check_distances(request.variant.distances, shape[-1])
        if shape != self._shape:
            raise DataError(f"image {sample.key} is {tuple(shape)}, the ones before are {tuple(self._shape)}")


def check_request(request: Request, denoiser: Denoiser) -> None:
    """See that a variant suits the denoiser and its classifier.

    Raises:
        SettingError: it asks for labels or levels that the denoiser does not know, or was not fitted.
    """
    variant = request.variant
    if isinstance(variant.guidance, LabelGuidance | AllLabels) and not denoiser.num_labels:
        raise SettingError(
            f"guidance: {variant.guidance.kind} needs a class-conditional denoiser; "
            "this one takes no labels (use kind: classifier)"
        )
    asked = isinstance(variant.guidance, LabelGuidance) or variant.inversion_scale is not None
    if asked and request.classifier.num_classes > denoiser.num_labels:
        raise SettingError(
            f"the classifier has {request.classifier.num_classes} classes, the denoiser {denoiser.num_labels}"
        )
    check_set(variant.stop)
    moves = GRIDS[variant.grid](denoiser.alphas_cumprod, variant.levels).levels
    if variant.max_level > moves:
        raise SettingError(f"stop: level {variant.max_level} is above the {moves} of this denoiser's grid; lower it")
    if variant.needs_train:
        raise SettingError("distance path: not fitted yet; call fit() with images first")


@torch.no_grad()
def pick_slots(denoiser: Denoiser, largest: int = 256, seconds: float = 2.0) -> int:
    """The batch at which the network evaluates the most images a second, by a short measurement.

    Sizes double until the rate has not grown by 3 % twice, memory ends, or the time is up; of sizes
    that are about as fast, the smallest.
    """
    channels, side, _ = denoiser.image_shape
    latents = denoiser.encode(torch.zeros(1, channels, side, side, device=denoiser.device))
    end, best, rate, worse, size = time.perf_counter() + seconds, 1, 0.0, 0, 1
    while size <= largest and worse < 2 and time.perf_counter() < end:
        x = latents.expand(size, *latents.shape[1:]).contiguous()
        where = torch.zeros(size, dtype=torch.long, device=x.device)
        try:
            times = []
            for _ in range(4):  # the first prepares
                before = time.perf_counter()
                denoiser.eps(x, where, where).sum().item()  # waits for a GPU
                times.append(time.perf_counter() - before)
                if time.perf_counter() > end:
                    break
        except torch.OutOfMemoryError:
            break
        now = size / min(times)
        worse = 0 if now > 1.03 * rate else worse + 1
        best, rate = (size, now) if now > 1.03 * rate else (best, rate)
        size *= 2
    return best


class _Pool:
    """Latents by number. Numbers are used again, so memory is that of the images at work."""

    def __init__(self) -> None:
        self._rows = torch.empty(0)
        self._held: list[int] = []
        self._free: list[int] = []

    def put(self, values: Tensor) -> list[int]:
        """Keep values [B, ...]; each is held once."""
        if len(self._free) < len(values):
            more = max(len(values), len(self._held), 16)
            spare = values.new_empty((more, *values.shape[1:]))
            self._rows = torch.cat([self._rows, spare]) if self._held else spare
            self._free += range(len(self._held) + more - 1, len(self._held) - 1, -1)
            self._held += [0] * more
        numbers = [self._free.pop() for _ in range(len(values))]
        for number in numbers:
            self._held[number] = 1
        self._rows.index_copy_(0, torch.tensor(numbers, device=values.device), values)
        return numbers

    def get(self, numbers: Sequence[int]) -> Tensor:
        """Their values, [B, ...]."""
        return self._rows.index_select(0, torch.tensor(numbers, device=self._rows.device))

    def hold(self, number: int) -> int:
        """Hold a number once more; returns it."""
        self._held[number] += 1
        return number

    def free(self, number: int | None) -> None:
        """Let go of a number once."""
        if number is not None:
            self._held[number] -= 1
            if not self._held[number]:
                self._free.append(number)


def _known(value: T | None) -> T:
    assert value is not None
    return value


def _sampling(variant: Variant) -> Hashable:
    """What variants must agree on to share an inversion."""
    return (variant.grid, variant.levels, variant.clip, variant.solver, variant.precision, variant.process_method)


def _rule(request: Request) -> _Rule:
    stop = request.variant.stop
    if isinstance(stop, int):
        return _Rule(str(stop), None)
    return _Rule(stop.model_dump_json(), id(request.classifier) if set(stop.thresholds) != {"psnr"} else None)
