"""Atlases in, corpus out: sources, gene harmonisation, quality control, planning, execution on Ray, commit."""
