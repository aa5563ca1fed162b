"""Sweeps: many runs of one recipe over grids of its keys, planned, run and recorded.

grid.py     the runs, and what identifies them
runner.py   runs them, and keeps their outcomes in a file
outcome.py  the outcome of a run, from what it logged
groups.py   outcomes of runs that differ in the learning rate and the seed only
optimum.py  the best learning rate of a group, and least squares with intervals
"""
