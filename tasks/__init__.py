"""One module a pipeline stage: read files, call diffguard, write files."""
