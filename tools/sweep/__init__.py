"""Sweeps: many runs of one recipe over grids of its keys, planned, run and recorded."""
