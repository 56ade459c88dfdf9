"""Stage prepare: a benchmark's images, brought to one format, and their manifest."""
