"""A detector as it is deployed: its bundle, its decisions with their reasons, its recalibration."""
