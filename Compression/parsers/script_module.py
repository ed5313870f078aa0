"""Any network as a TorchScript file, with a JSON file of the same stem beside it.

    {"input_size": 512, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
     "class_names": ["background", "car"], "classes_excluded": [0], "output": "logits"}

The network maps (N, 3, input_size, input_size), pictures in [0, 1] less mean over std, to "logits"
or "probabilities" (N, n_classes, h, w), "classes" (N, h, w), or "mask" (N, 1, h, w): the
probability of the second of two classes. Without mean and std there is no normalisation.

TorchScript holds no Python. But a program can write files (`torch.save`), map files of this
machine, and call operators that some library registered, already while it is loaded. Its source
lies in the archive, so such files are refused before they are loaded. The files of `torch.export`
are refused, all of them: PyTorch reads them with a pickle that may run any code.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Compression.parsers.base import Loaded, check_output
from Compression.parsers.normalised import Normalised
from Evaluation.features import fingerprint
from Util.files import unpacked_size

OUTPUTS = ("logits", "probabilities", "classes", "mask")
KEYS = {"input_size", "mean", "std", "class_names", "classes_excluded", "output"}
FORBIDDEN = {"save", "load", "from_file", "__setstate__", "_save", "_load_for_executorch"}
"""Names that do more than compute, or that run while the file is loaded."""


class ScriptParser(Normalised):
    """A TorchScript network.

    Args:
        output: one of `OUTPUTS`.
        how: see `Normalised`.
    """

    def __init__(self, output: str, **how: Any) -> None:
        super().__init__(**how)
        self.output = output

    def classify(self, images: Tensor) -> Tensor:
        """See `Parser`."""
        found = self.network(self.prepare(images))
        if not isinstance(found, Tensor):
            raise ValueError(f"the module returns a {type(found).__name__}, not a tensor")
        if self.output == "classes":
            if found.is_floating_point():
                raise ValueError("the module returns floating-point numbers, not classes")
            count, low, high = len(self.class_names), int(found.min()), int(found.max())
            if low < 0 or high >= count:
                raise ValueError(f"the module returns classes {low} to {high}, but has {count}")
            return found.long()
        if self.output == "mask":
            if found.ndim != 4 or found.shape[1] != 1:
                raise ValueError(
                    f"the module returns masks of shape {tuple(found.shape)} for {len(images)}"
                    " pictures, not (N, 1, h, w)"
                )
            found = torch.cat([1 - found, found], dim=1)
        return found if self.output == "logits" else found.clamp_min(1e-8).log()


def load(argument: str, device: torch.device) -> Loaded:
    """Load a TorchScript file and its JSON file."""
    file = Path(argument)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; give a TorchScript module")
    given = _facts(file.with_suffix(".json"))
    _check_source(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's advice to take torch.export, see above
            network = torch.jit.load(str(file), map_location=device)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{file}: no readable TorchScript module ({reason})") from None
    facts: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3, "classes_excluded": [0]} | given
    parser = ScriptParser(network=network, **facts).to(device)
    try:
        check_output(parser, str(file), device)
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
    identity = f"module {fingerprint(file)} with {fingerprint(file.with_suffix('.json'))}"
    return Loaded(parser, file.name, identity)


def _facts(file: Path) -> dict[str, Any]:
    """Read and check what the JSON file says.

    Raises:
        ValueError: names the file and the entry.
    """
    if not file.is_file():
        raise ValueError(f"{file}: missing; a module needs its input size and classes, as JSON")
    try:
        facts = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: no JSON ({error})") from None
    if not isinstance(facts, Mapping) or facts.keys() - KEYS:
        raise ValueError(f"{file}: expected an object of {', '.join(sorted(KEYS))}")
    facts = {"output": "logits", "class_names": []} | dict(facts)
    for key, fits in _checks(facts).items():
        if not fits:
            raise ValueError(f"{file}: {key} is {str(facts.get(key))[:80]}; see doc/content.md")
    return facts


def _checks(facts: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each entry fits."""
    names, size, channels = facts["class_names"], facts.get("input_size"), {}
    for key in ("mean", "std"):
        values = facts.get(key, [1.0] * 3)
        numbers = isinstance(values, list) and all(type(v) in (int, float) for v in values)
        channels[key] = numbers and len(values) == 3 and (key == "mean" or min(values) > 0)
    text = isinstance(names, list) and all(isinstance(n, str) and n.isprintable() for n in names)
    excluded = facts.get("classes_excluded", [])
    indices = isinstance(excluded, list) and all(type(c) is int for c in excluded)
    return {
        "input_size": type(size) is int and 1 <= size <= 4096,
        **channels,
        "class_names": text and len(names) > 0,
        "classes_excluded": indices and all(0 <= c < len(names) for c in excluded),
        "output": facts["output"] in OUTPUTS and (facts["output"] != "mask" or len(names) == 2),
    }


def _check_source(file: Path) -> None:
    """Refuse what is no TorchScript, or would do more than compute.

    Raises:
        ValueError: names the file and what it would call.
    """
    with open(file, "rb") as stream:
        if stream.read(2) != b"PK":
            raise ValueError(f"{file}: no TorchScript module; make one by torch.jit.trace")
    if unpacked_size(file) > 2**26 + 16 * file.stat().st_size:
        raise ValueError(f"{file}: refused, it would unpack to far more than its size")
    with zipfile.ZipFile(file) as archive:
        names = [name.lower() for name in archive.namelist()]
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: refused, it holds two files of one name")
        if any("/models/" in f"/{name}" or name.endswith("archive_format") for name in names):
            raise ValueError(
                f"{file}: refused, torch.export's files may run any code when they are read; save"
                " it as TorchScript (torch.jit.trace, then .save)"
            )
        if not any(name.endswith("constants.pkl") for name in names):
            raise ValueError(f"{file}: no TorchScript module; make one by torch.jit.trace")
        for name in archive.namelist():
            if name.lower().endswith(".py"):
                _check_names(file, archive.read(name).decode("utf-8", "replace"))


def _check_names(file: Path, source: str) -> None:
    """Refuse source that names an operator outside of PyTorch's own, or one of `FORBIDDEN`."""
    names = re.findall(r"[^\W\d]\w*", source)
    # As it is written out: a comment could stand between ops and what follows.
    foreign = re.findall(r"(?<![^\W\d])ops\b(?!\.prim\.)[\w.]{0,40}", source)
    found = sorted(FORBIDDEN & set(names)) + foreign
    if found:
        raise ValueError(f"{file}: refused, its program has {found[0]}, which may do anything")
