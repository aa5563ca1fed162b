"""Models of Hugging Face transformers.

architectures.py  one row for each architecture: a new one is added here
weights.py        the tables of parameter names
config.py         config.json to [model], and back
"""
