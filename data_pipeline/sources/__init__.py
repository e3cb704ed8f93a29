"""Readers of input atlases, all behind one interface: `open_source(path)` gives a `Source`."""
from data_pipeline.sources.base import Source, open_source

__all__ = ["Source", "open_source"]
