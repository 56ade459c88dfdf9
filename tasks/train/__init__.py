"""Stage train: the classifiers under protection and the denoiser."""
