"""From InD scores to decisions: conformal p-values, z-scores, and tests for drift."""
