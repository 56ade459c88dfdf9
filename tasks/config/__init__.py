"""What is run: params.yaml, benchmark files, and the choices of one run."""
