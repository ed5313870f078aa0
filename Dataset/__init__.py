"""Pictures to train on and to compare with: sources, batches, loading, preparation."""


class DatasetError(ValueError):
    """A data set cannot be used; the message names the path, what was found and what to do."""
