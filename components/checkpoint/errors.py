"""What can go wrong with a checkpoint after it was asked for."""


class SaveError(RuntimeError):
    """A checkpoint that was to be written in the background could not be."""
