"""What stages use of MLflow and DVC."""
