"""How many images are computed at once.

The memory that a network takes for a batch grows with the batch's pixels, so these are what is
bounded: 64 images of 256 px are as many pixels as 4 of 1024 px. What is computed depends on the
number by the rounding of the convolutions alone. ``python -m benchmarks.memory --fake`` prints what
the bounds come to.
"""

INFERENCE = 2**22
"""Pixels that a generator makes, and other networks see, without gradients."""
GRADIENTS = 2**21
"""Pixels of which gradients by latents and layer noise are computed."""
SCORING = 2**18
"""Pixels of which gradients by the weights are computed: four images of 256 px."""
PARSING = {"cpu": 2**19, "cuda": INFERENCE}
"""Pixels that a parser sees, by the kind of device; on a CPU, more gain little."""


def at_once(side: int, pixels: int, most: int | None = None) -> int:
    """Return how many images of a side in px are computed at once.

    Args:
        side: of an image, in px.
        pixels: that all of them may have; one image is computed whatever it has.
        most: images, if there is such a bound.
    """
    images = max(1, pixels // side**2)
    return images if most is None else min(images, most)
