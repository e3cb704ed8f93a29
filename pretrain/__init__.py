"""Corpus to checkpoint to release: loader, objective, engine, loop, checkpoints, export."""
