"""Sources of images, as a benchmark file names them."""
