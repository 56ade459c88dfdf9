"""DiffGuard: out-of-distribution detection by semantic mismatch with diffusion models.

The method of arXiv 2308.07687 (ICCV 2023) as a library on PyTorch and Diffusers. It asks of each
image whether it looks like what the classifier says it is: the image is inverted into a diffusion
model's noise, regenerated under the predicted label, and scored by how far the result is from it.
"""

__version__ = "0.1.0"

METHOD_VERSION = 4
"""Raised whenever the arithmetic of a score changes, so that old scores are not taken for new ones."""
