"""diffguard doctor: what is wrong with a benchmark, and what its run will cost."""
