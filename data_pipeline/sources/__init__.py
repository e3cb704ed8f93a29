"""Readers of input atlases, all behind one interface: `open_source(place)` gives a `Source`."""
from data_pipeline.sources.base import Source
from data_pipeline.sources.kinds import open_source
from data_pipeline.sources.location import Location

__all__ = ["Location", "Source", "open_source"]
