"""The project's folder."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The project's folder: params.yaml, dvc.yaml and data/ are here."""
