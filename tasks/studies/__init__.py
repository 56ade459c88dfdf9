"""Studies: what a grid of settings does to the measures, as one table, figure, page and parent run in MLflow."""
