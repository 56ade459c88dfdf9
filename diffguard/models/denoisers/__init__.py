"""Diffusion models from folders of Diffusers' layout."""
