"""Labels of the oracle settings, which measure how good the method could be."""

from hashlib import sha256


def oracle_label(kind: str, true_label: int, num_classes: int, key: str, seed: int = 0) -> int | None:
    """The label that a variant's ``label`` setting guides to; None: the classifier's prediction.

    Args:
        kind: "predicted", "oracle" or "oracle-ind"; see `Variant`.
        true_label: negative for OOD images.
        key: of the image, its content hash: the random label of an OOD image depends on it and the
            seed alone.
    """
    if kind == "predicted" or (kind == "oracle-ind" and true_label < 0):
        return None
    if true_label >= 0:
        return true_label
    return int(sha256(f"{seed}:{key}".encode()).hexdigest(), 16) % num_classes
