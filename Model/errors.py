"""The error of everything that reads networks from files."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, what was found and what to do."""
