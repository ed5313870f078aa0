"""What tests of several files need."""

import torch


def left_half(images):
    """A content mask: the left half of every image."""
    mask = torch.zeros_like(images[:, :1])
    mask[..., : mask.shape[-1] // 2] = 1
    return mask


def error_of(capsys, call):
    """The one line of an error with exit code 2, whether argparse or the script found it."""
    try:
        code = call()
    except SystemExit as error:
        code = error.code
    assert code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.strip() and "scoring (" not in line]
    assert len(lines) == 1, captured.err
    return lines[0]
