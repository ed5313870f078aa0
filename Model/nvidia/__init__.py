"""Import of NVIDIA's StyleGAN2 files, none of whose code is run.

Taken are the pickles of stylegan2-ada-pytorch, of stylegan3's StyleGAN2 configurations, and of the
TensorFlow StyleGAN2 and StyleGAN2-ADA (configurations E and F): generator, its moving average,
discriminator and mean w. What a network of this project could not compute alike is refused with
the reason. Every ``--ckpt`` takes such a file; ``python -m Model.nvidia IN.pkl OUT.pt`` converts.

There is no way back. NVIDIA's loaders make a network by running the Python source in the file, so
one without source is refused by them, and this project writes no file that carries code.

`reader` reads the pickle, `configuration` says what is supported, `layout` maps the tensors.
"""

import os
import warnings
from collections.abc import Mapping
from typing import Any

from Model.errors import CheckpointError
from Model.nvidia.configuration import Facts, Kind, UnsupportedError
from Model.nvidia.networks import convert_network
from Model.nvidia.reader import RefusedError, TensorFlowNetwork, is_pickle, read_pickle

__all__ = ["import_networks", "is_pickle", "read"]

NAMES: Mapping[str, tuple[str, Kind]] = {
    "G": ("g", "generator"),
    "G_ema": ("g_ema", "generator"),
    "D": ("d", "discriminator"),
}
"""NVIDIA's name -> ours and what it is."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file as `Model.checkpoint.read` does; what is not quite the same is a warning.

    Raises:
        CheckpointError: see `import_networks`.
    """
    content, notes, clamp = import_networks(path)
    if clamp is not None:
        notes.append(
            f"it was trained with activations clamped to {clamp:g}, and nothing is clamped here;"
            " python -m Model.nvidia finds out whether they ever reach that"
        )
    for note in notes:
        warnings.warn(f"{path}: {note}", stacklevel=3)
    return content


def import_networks(
    path: str | os.PathLike[str], discriminator: bool = True
) -> tuple[dict[str, Any], list[str], float | None]:
    """Convert a file.

    Args:
        path: NVIDIA's pickle.
        discriminator: convert it too; False for a file where it alone is unsupported.

    Returns:
        A checkpoint: state dicts ``g``, ``g_ema``, ``d``, as far as there, and ``latent_avg``
        (style_dim,); what differs from NVIDIA's networks, one sentence each; and the magnitude at
        which training in half precision cut activations off, which our format has no place for.

    Raises:
        CheckpointError: the file names something that no network needs, is damaged, or holds a
            network that cannot be converted exactly.
    """
    content: dict[str, Any] = {}
    facts: dict[str, Facts] = {}
    for theirs, network in _networks(path).items():
        ours, kind = NAMES[theirs]
        if kind == "discriminator" and not discriminator:
            continue
        try:
            state, facts[ours], latent_avg = convert_network(network, kind)
        except UnsupportedError as error:
            raise CheckpointError(f"{path}: its network {theirs} is unsupported: {error}") from None
        except Exception as error:  # a file made by hand can hold anything in any place
            raise CheckpointError(f"{path}: {theirs} is damaged ({_reason(error)})") from None
        content[ours] = state
        if latent_avg is not None and (ours == "g_ema" or "latent_avg" not in content):
            content["latent_avg"] = latent_avg
    clamp = min((f.clamp for f in facts.values() if f.clamp is not None), default=None)
    return content, _notes(facts), clamp


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _networks(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The networks in a pickle by NVIDIA's names.

    Raises:
        CheckpointError: there are none, or the pickle is refused or damaged.
    """
    try:
        content = read_pickle(path)
    except RefusedError as error:
        raise CheckpointError(
            f"{path}: refused, it names {error}, which no network of NVIDIA needs; do not load it"
            " elsewhere either, or save it again as state dicts only"
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path}: not a whole pickle of NVIDIA's ({_reason(error)}); get it again"
        ) from None
    if isinstance(content, TensorFlowNetwork):
        return {"G_ema": content}
    if isinstance(content, tuple) and len(content) == 3:
        return dict(zip(("G", "D", "G_ema"), content, strict=True))
    named = content if isinstance(content, dict) else {}
    found = {name: named[name] for name in NAMES if name in named}
    if not found.keys() & {"G", "G_ema"}:
        held = ", ".join(map(str, named)) or type(content).__name__
        raise CheckpointError(
            f"{path}: no generator of NVIDIA's (G_ema) in it; it holds {held[:120]}"
        )
    return found


def _notes(facts: Mapping[str, Facts]) -> list[str]:
    if "d" not in facts or facts["d"].group == 4:
        return []
    group = facts["d"].group or "the whole batch"
    return [
        f"its discriminator compares images in groups of {group} (minibatch standard deviation),"
        " here they are of 4; batches of more images get other logits"
    ]
