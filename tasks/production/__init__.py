"""A detector at work: production images, monitoring, recalibration."""
