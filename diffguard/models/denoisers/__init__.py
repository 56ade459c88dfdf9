"""Denoisers: diffusion models behind one interface, a family a module."""
