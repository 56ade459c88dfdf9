"""Rows beside the variants: detectors of pytorch-ood, and several detectors as one."""

from typing import Any, Literal

from pydantic import (
    Field,
    model_validator,
)

from diffguard.settings.base import Settings


class Baseline(Settings):
    """A pytorch-ood detector as ``package.module:name`` and what it is given.

    Attributes:
        sees: what stands in the place of its model: the classifier (logits), its penultimate layer
            (features), the image's values in a row (pixels), or the image as it is (images).
        arguments: of its constructor.
    """

    detector: str
    sees: Literal["logits", "features", "pixels", "images"]
    arguments: dict[str, Any] = Field(default_factory=dict)


class Combination(Settings):
    """Several detectors as one; see `diffguard.detectors.combination`.

    In params.yaml it is a row of the result table, beside the rows that it is made of.

    Attributes:
        kind: ``z-sum``, the sum of the z-scores of calibrated p-values; ``fisher``, Fisher's sum of -2 log p;
            ``maximum``, the largest z-score; ``residual``, what is left of the first when the second is
            regressed out on InD calibration images; ``cascade``, the first decides clear cases, and the second
            those between.
        of: names of rows. A residual and a cascade are of two.
        loss: of a cascade: how much less AUROC than the second's alone it may have against validation's near-OOD
            images, and as much against its far-OOD images.
    """

    kind: Literal["z-sum", "fisher", "maximum", "residual", "cascade"]
    of: tuple[str, ...] = Field(min_length=2)
    loss: float | None = Field(default=None, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> "Combination":
        if self.kind in ("residual", "cascade") and len(self.of) != 2:
            raise ValueError(f"of: a {self.kind} is of two rows, not {len(self.of)}")
        if twice := [name for name in self.of if self.of.count(name) > 1]:
            raise ValueError(f"of: {twice[0]} is there twice")
        if (self.loss is None) == (self.kind == "cascade"):
            raise ValueError("loss is needed by a cascade, and only there")
        return self
