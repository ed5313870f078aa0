"""Fetch published weights on first use, whole and verified."""

from pathlib import Path

import torch

from Model.checkpoint import CheckpointError
from Util.files import folder_lock


def download_path(url: str) -> Path:
    """Return where a download is kept: PyTorch's folder for such files (see ``TORCH_HOME``)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def downloaded(url: str, otherwise: str) -> Path:
    """Return the file of a URL, fetched if it is not there yet.

    It appears under its name only once it is whole and, where the name ends in digits of its
    SHA-256 (NAME-DIGITS.SUFFIX), these agree. Of several processes that need it, one fetches it and
    the others wait.

    Args:
        url: of the file.
        otherwise: what else the user can do, for the message.

    Raises:
        CheckpointError: the download failed; names the file, where to get it and where to put it.
    """
    file = download_path(url)
    if file.is_file():
        return file
    digits = file.stem.partition("-")[2].rsplit("-", 1)[-1] or None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with folder_lock(file.parent):
            if not file.is_file():  # else another process has fetched it meanwhile
                torch.hub.download_url_to_file(url, str(file), hash_prefix=digits)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{file} is missing and could not be downloaded ({error}); put {url} there, or"
            f" {otherwise}"
        ) from None
    return file
