"""Opening a deployed detector by name: a folder, MLflow, DVC, the Hugging Face hub, or any file system of fsspec."""

from diffguard.loading.opening import open_detector as open_detector
