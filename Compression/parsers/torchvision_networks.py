"""Torchvision's segmentation networks: FCN, DeepLabV3, LR-ASPP, of the 21 classes of PASCAL VOC.

Sizes, normalisation and class names are those that torchvision publishes with the weights. They
were trained on COCO pictures that show these classes.
"""

from pathlib import Path

import torch
from torch import Tensor
from torchvision import models

from Compression.parsers.base import Loaded
from Compression.parsers.normalised import Normalised
from Evaluation.features import fingerprint
from Model.checkpoint import CheckpointError, load_strict, read
from Model.downloads import downloaded


class TorchvisionParser(Normalised):
    """A segmentation network whose result is the entry ``out`` of a dict."""

    def classify(self, images: Tensor) -> Tensor:
        """Logits (N, 21, input_size, input_size)."""
        return self.network(self.prepare(images))["out"]


def load(argument: str, device: torch.device) -> Loaded:
    """Load NAME, its weights downloaded on first use, or NAME=FILE."""
    name, equals, given = argument.partition("=")
    known = models.list_models(module=models.segmentation)
    if name not in known:
        raise ValueError(f"torchvision:{name}: unknown network; there are {', '.join(known)}")
    if equals and not given:
        raise ValueError(
            f"torchvision:{argument}: no file after the =; name one or leave out the ="
        )
    published = models.get_model_weights(name).DEFAULT
    file = Path(given or downloaded(published.url, f"name it by torchvision:{name}=FILE"))
    state = read(file)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: not a state dict of torchvision's {name}")
    aux = any(key.startswith("aux_classifier.") for key in state)
    how = {"weights": None, "weights_backbone": None, "num_classes": 21}
    network = models.get_model(name, **how, **({"aux_loss": aux} if "lraspp" not in name else {}))
    load_strict(network, state, str(file))
    if aux:
        network.aux_classifier = None  # it serves training only
    preset = published.transforms()
    _, *others = published.meta["categories"]
    size, mean, std = preset.resize_size[0], preset.mean, preset.std
    parser = TorchvisionParser(network, size, mean, std, ("background", *others), (0,))
    return Loaded(
        parser.to(device), f"torchvision:{name}", f"torchvision {name} {fingerprint(file)}"
    )
