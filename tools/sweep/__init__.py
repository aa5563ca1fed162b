"""Many runs of one recipe over grids of its keys: planned, run, remembered, and what they say of the learning rate."""
