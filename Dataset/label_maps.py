"""Pictures with a class index for every pixel, read from a folder."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from Dataset.images import to_float
from Dataset.pictures import UnreadableImageError, read_image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class LabelMapError(ValueError):
    """A folder of pictures and label maps cannot be used; the message names the file."""


class LabelMapDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of a picture and its label map.

    The folder holds `images/NAME.png` (or .jpg, .jpeg) and, for each, `labels/NAME.png`: 8-bit
    greyscale or palette, the value is the class index. The two may differ in size, as in
    CelebAMask-HQ, but not in proportions.

    Args:
        path: the folder.
        size: side in pixels that both are resized to, the picture with antialiasing, the label map
            by its nearest value.
        n_classes: label values must be below it.

    Raises:
        LabelMapError: if a folder or a picture's label map is missing, or there is no picture.
    """

    def __init__(self, path: str | Path, size: int, n_classes: int) -> None:
        self.path = Path(path)
        self.size = size
        self.n_classes = n_classes
        for name in ("images", "labels"):
            if not (self.path / name).is_dir():
                raise LabelMapError(f"{path}: no folder {name} there; expected images/ and labels/")
        self.images = [
            file
            for file in sorted((self.path / "images").iterdir())
            # Hidden files are left-overs of other programs.
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not self.images:
            raise LabelMapError(f"{path}: no .png, .jpg or .jpeg picture in its folder images")
        # One listing instead of a look-up per picture: folders may hold many thousands of files.
        labels = {file.name for file in (self.path / "labels").iterdir()}
        for image in self.images:
            if f"{image.stem}.png" not in labels:
                raise LabelMapError(f"{image} has no label map {self.label_path(image)}")

    def label_path(self, image: Path) -> Path:
        """Return the file of a picture's label map."""
        return self.path / "labels" / f"{image.stem}.png"

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Read one pair.

        Returns:
            The picture (3, size, size), float32 in [-1, 1], and its label map (size, size), int64.

        Raises:
            LabelMapError: if a file cannot be read, the label map is no 8-bit index map, has other
                proportions than the picture, or a value of `n_classes` or more.
        """
        image_path = self.images[index]
        label_path = self.label_path(image_path)
        image, label = _picture(image_path), _label_map(label_path)
        if label.mode not in ("L", "P"):
            raise LabelMapError(
                f"{label_path} is in mode {label.mode}; label maps are 8-bit greyscale or palette "
                "pictures whose values are class indices"
            )
        if image.width * label.height != image.height * label.width:
            raise LabelMapError(
                f"{label_path} has {label.width}x{label.height} pixels, its picture "
                f"{image.width}x{image.height}; they must have the same proportions"
            )
        highest = int(np.asarray(label).max())
        if highest >= self.n_classes:
            raise LabelMapError(
                f"{label_path} has class {highest}, but there are only {self.n_classes} classes, "
                "counted from 0; raise n_classes or correct the label map"
            )
        side = (self.size, self.size)
        # Pillow's bilinear filter widens with the reduction, so this does not alias.
        pixels = np.array(image.resize(side, Image.Resampling.BILINEAR))
        classes = np.array(label.resize(side, Image.Resampling.NEAREST))
        picture = to_float(torch.from_numpy(pixels).permute(2, 0, 1))
        return picture, torch.from_numpy(classes).long()


def _picture(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except UnreadableImageError as error:
        raise LabelMapError(f"cannot read {path}: {error}") from None


def _label_map(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except Exception as error:  # decoders raise almost anything on damaged bytes
        raise LabelMapError(f"cannot read {path}: {error}") from None
