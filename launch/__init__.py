"""The command line `scgpt` and all that starts jobs or needs both the pipeline and the model."""
