"""Which implementation of an operator runs."""

from typing import Literal

Impl = Literal["auto", "reference", "native"]


def check_impl(operator: str, impl: Impl) -> None:
    """Refuse an unknown ``impl``, and ``"native"`` where no compiled kernel is built.

    Raises:
        ValueError: ``impl`` is none of the three names.
        NotImplementedError: a compiled kernel was demanded; only ``"auto"`` falls back silently.
    """
    if impl not in ("auto", "reference", "native"):
        raise ValueError(f"{operator}: impl must be auto, reference or native, not {impl!r}")
    if impl == "native":
        raise NotImplementedError(
            f"{operator}: this build has no compiled kernel; use impl='auto' or 'reference'"
        )
