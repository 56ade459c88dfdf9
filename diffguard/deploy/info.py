"""What a deployed detector is, but for its models and scores."""

from typing import Any

from diffguard.errors import SettingError
from diffguard.settings import Baseline, Combination, ImageFormat, Settings, Variant


class DetectorInfo(Settings):
    """What a deployed detector is, but for models and calibration scores.

    Attributes:
        diffguard: the version of the library that wrote it.
        method_version: that of the scores' arithmetic.
        benchmark: where it comes from.
        seed: of its models' training.
        classes: names of the labels.
        image: what every image is brought to first.
        alpha: the guaranteed false-rejection rate: the share of InD images that are taken for OOD, at most.
        detector: its row in the result table, in one of the next three.
        variants: thresholds set.
        baselines, combine: the rows that it is made of, as in params.yaml. Candidates that were not chosen are no rows.
        combined: by combination, what was fitted; see `diffguard.detectors.combination.Combined.to_json`.
        classifier: name of the classifier in the benchmark.
    """

    diffguard: str
    method_version: int
    benchmark: str
    classifier: str
    seed: int
    classes: tuple[str, ...]
    image: ImageFormat
    alpha: float
    detector: str
    variants: dict[str, Variant]
    baselines: dict[str, Baseline]
    combine: dict[str, Combination]
    combined: dict[str, dict[str, Any]]

    def settings_of(self, name: str) -> Variant | Baseline | Combination:
        """The settings of a row.

        Raises:
            SettingError: it has none here.
        """
        for rows in (self.variants, self.baselines, self.combine):
            if name in rows:
                return rows[name]
        raise SettingError(f"detector {name}: neither a variant, nor a baseline, nor a combination of this bundle")

    def rows_of(self, name: str) -> list[str]:
        """The rows that a row is made of, members before what combines them; itself last, each once.

        Of a combination that has chosen among its rows they are those alone.
        """
        settings, found = self.settings_of(name), dict[str, None]()
        if isinstance(settings, Combination):
            for member in self.combined.get(name, {}).get("members") or settings.of:
                found |= dict.fromkeys(self.rows_of(member))
        return [*found, name]
