"""Models of Hugging Face transformers.

architectures.py  one row for each architecture: a new one is added here
weights.py        the names of parameters
config.py         config.json to [model], and back, for each family
rope.py           the entries of rotary embedding
entries.py        reading entries of an untrusted config.json
"""
