"""The models that the method stands on: classifiers, denoisers, their folders and weights."""
