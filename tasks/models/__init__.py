"""The models of a benchmark: checked, and loaded with what is fitted on them."""
