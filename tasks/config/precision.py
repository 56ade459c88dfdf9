"""What ``precision: auto`` of a variant means in a run: one precision, written down with the scores."""

from pathlib import Path

from diffguard.errors import SettingError
from tasks.common.files import read_json, write_json
from tasks.common.text import known_name
from tasks.config.params import Params

NOTE = "precision.json"
"""In the folder of a run's scores: what auto meant when they were made."""

PRECISIONS = ("float32", "bfloat16")


def with_precision(params: Params, precision: str | None, scores: Path | None) -> tuple[Params, str | None]:
    """params.yaml with a precision in place of ``auto``, and that precision; None: no variant says ``auto``.

    Args:
        precision: the one; None: what the recorded scores were made in, else what is fast on this machine.
        scores: the folder of scores that DVC records; None: this run's are elsewhere.

    Raises:
        SettingError: the precision is unknown.
    """
    if precision is not None:
        known_name("precision", [precision], PRECISIONS)
    variants = params.score.variants
    if not any(variant.precision == "auto" for variant in variants.values()):
        return params, None
    chosen = precision or (None if scores is None else recorded_precision(scores)) or fast_precision()
    settled = {
        name: variant.model_copy(update={"precision": chosen}) if variant.precision == "auto" else variant
        for name, variant in variants.items()
    }
    return params.model_copy(update={"score": params.score.model_copy(update={"variants": settled})}), chosen


def fast_precision() -> str:
    """What auto means on the device of this machine that scores."""
    from diffguard.utils.precision import resolve_precision
    from tasks.common.devices import devices

    return resolve_precision("auto", devices()[0])


def recorded_precision(scores: Path) -> str | None:
    """What auto meant when these scores were made; None: nobody wrote it down.

    Raises:
        DataError: the note is damaged. SettingError: it has an unknown precision.
    """
    note = scores / NOTE
    if not note.is_file():
        return None
    precision = read_json(note, "delete it, and run: dvc repro score").get("auto")
    if precision not in PRECISIONS:
        raise SettingError(f"{note}: auto: {precision!r} is not one of {', '.join(PRECISIONS)}; delete the file")
    return str(precision)


def record_precision(scores: Path, precision: str) -> None:
    """Write down what auto means in these scores."""
    if recorded_precision(scores) != precision:
        write_json(scores / NOTE, {"auto": precision})
