"""Rows beside the variants: detectors of pytorch-ood, and several detectors as one."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from diffguard.settings.base import Settings


class Baseline(Settings):
    """A pytorch-ood detector as ``package.module:name`` and what it is given.

    Attributes:
        sees: what stands in the place of its model: the classifier (logits), its penultimate layer
            (features), the image's values in a row (pixels), the image as it is (images), the network up to
            feature maps [B, C, H, W] (maps), or the classifier as a module whose layers it hooks (layers).
        arguments: of its constructor. What it needs of the classifier beside that (its head, the head's weight and
            bias, layers) it gets by the parameter's name; see `diffguard.detectors.parts.PARTS`.
        layer: dotted name of the module whose output are the maps, or, pooled over space or tokens, the features;
            None: the classifier's ``cam_layer``, or the head's inputs.
        layers: of sees layers, dotted names of the modules, in the network's order; None: the ``cam_layer`` alone.
    """

    unwritten = frozenset({"layer", "layers"})

    detector: str
    sees: Literal["logits", "features", "pixels", "images", "maps", "layers"]
    arguments: dict[str, Any] = Field(default_factory=dict)
    layer: str | None = None
    layers: tuple[str, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Baseline":
        if self.layer is not None and self.sees not in ("features", "maps"):
            raise ValueError(f"layer: it belongs to sees: features or maps, not {self.sees}")
        if self.layers is not None and self.sees != "layers":
            raise ValueError(f"layers: they belong to sees: layers, not {self.sees}")
        return self


@dataclass(frozen=True)
class CombinationKind:
    """A kind of combination.

    Attributes:
        implementation: ``package.module:Class`` of a `diffguard.detectors.combination.Combined`.
        members: of how many rows it is; None: of two or more.
        fuses: whether all members have a part in the score of every image.
        gated: whether the first row decides which images the second has to score, for a stated `Combination.loss`.
        chooses: whether something of it is chosen, or fitted, on the validation split.
        confident: whether it chooses with `Combination.confidence`.
    """

    implementation: str
    members: int | None = None
    fuses: bool = True
    gated: bool = False
    chooses: bool = False
    confident: bool = False


COMBINATION_KINDS = {
    "z-sum": CombinationKind("diffguard.detectors.fusion:ZSum"),
    "fisher": CombinationKind("diffguard.detectors.fusion:Fisher"),
    "maximum": CombinationKind("diffguard.detectors.fusion:Maximum"),
    "residual": CombinationKind("diffguard.detectors.residual:Residual", members=2, fuses=False),
    "cascade": CombinationKind(
        "diffguard.detectors.cascade:Cascade", members=2, fuses=False, gated=True, chooses=True, confident=True
    ),
    "best": CombinationKind("diffguard.detectors.selection:Best", chooses=True, confident=True),
    "weighted": CombinationKind("diffguard.detectors.weighted:Weighted", chooses=True),
}
"""By the name that settings have. A new kind is a class and a line here."""


def _check_kind(name: str) -> str:
    if name not in COMBINATION_KINDS:
        raise ValueError(f"{name!r} is not one of {', '.join(COMBINATION_KINDS)}")
    return name


class Combination(Settings):
    """Several detectors as one; see `diffguard.detectors.combination`.

    In params.yaml it is a row of the result table, beside the rows that it is made of.

    Attributes:
        kind: ``z-sum``, the sum of the z-scores of calibrated p-values; ``fisher``, Fisher's sum of -2 log p;
            ``maximum``, the largest z-score; ``best``, the z-sum of those of its rows that validation chooses;
            ``weighted``, the weighted sum of z-scores, with weights that are fitted on validation;
            ``residual``, what is left of the first when the second is regressed out on InD calibration images;
            ``cascade``, the first decides clear cases, and the second those between.
        of: names of rows. A residual and a cascade are of two; of a best or a weighted they are candidates.
        loss: of a cascade: how much less AUROC than the second's alone it may have against near-OOD images, and as
            much against far-OOD images.
        confidence: of a cascade: the confidence, on validation, with which it loses no more than that. Of a best:
            that of the interval of a gain, which has to exclude zero.
    """

    unwritten = frozenset({"confidence"})

    kind: Annotated[str, AfterValidator(_check_kind)]
    of: tuple[str, ...] = Field(min_length=2)
    loss: float | None = Field(default=None, ge=0, lt=1)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Combination":
        kind = COMBINATION_KINDS[self.kind]
        if kind.members is not None and len(self.of) != kind.members:
            raise ValueError(f"of: a {self.kind} is of {kind.members} rows, not {len(self.of)}")
        if duplicates := [name for name in self.of if self.of.count(name) > 1]:
            raise ValueError(f"of: {duplicates[0]} is there twice")
        if (self.loss is None) == kind.gated:
            raise ValueError(f"loss is needed by a {_kinds('gated')}, and only there")
        if "confidence" in self.model_fields_set and not kind.confident:
            raise ValueError(f"confidence is a setting of a {_kinds('confident')}, and of nothing else")
        return self

    @property
    def fuses(self) -> bool:
        """See `CombinationKind`."""
        return COMBINATION_KINDS[self.kind].fuses

    @property
    def is_gated(self) -> bool:
        """See `CombinationKind`."""
        return COMBINATION_KINDS[self.kind].gated

    @property
    def chooses(self) -> bool:
        """See `CombinationKind`."""
        return COMBINATION_KINDS[self.kind].chooses


def _kinds(attribute: str) -> str:
    return " or ".join(name for name, kind in COMBINATION_KINDS.items() if getattr(kind, attribute))
