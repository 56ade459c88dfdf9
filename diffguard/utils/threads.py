"""How threads of OpenMP wait, for programs: set before PyTorch is imported, hence no torch here."""

import os


def set_wait_policy() -> None:
    """Let OpenMP's threads sleep while they wait for each other, unless the user has chosen otherwise.

    By default they spin for some time first, and stall whenever another process has the core that one of them needs.
    Sets the environment variable OMP_WAIT_POLICY to passive (OpenMP 5.2, section 21.7), unless it or GOMP_SPINCOUNT is
    set. An OpenMP library reads it when it is loaded: call this before torch or scikit-learn is imported.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
