"""From InD scores to decisions: conformal p-values, z-scores, and what drift does to both."""
