"""The classes of enlarged logits: the compiled operator against loops, and against PyTorch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from Model.ops import dispatch, upsampled_argmax

if (reason := dispatch.why_not("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)


def source(i, before, after, corners):
    """Where sample i of an enlarged line lies in the line before, in double precision."""
    if corners:
        return i * (before - 1) / (after - 1) if after > 1 else 0.0
    return min(max((i + 0.5) * before / after - 0.5, 0.0), before - 1.0)


def sample(values, y, x):
    """Bilinear value of a map at a position."""
    top, left = int(y), int(x)
    bottom, right = min(top + 1, len(values) - 1), min(left + 1, len(values[0]) - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * values[top][left] + dx * values[top][right]
    lower = (1 - dx) * values[bottom][left] + dx * values[bottom][right]
    return (1 - dy) * upper + dy * lower


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("size", [(7, 9), (8, 6), (1, 1), (2, 3)])
def test_is_the_largest_of_the_enlarged_maps(size, corners):
    maps = torch.randn(2, 5, 4, 3)
    found = upsampled_argmax(maps, size, corners, impl="native")
    assert found.shape == (2, *size)
    for n in range(2):
        for i in range(size[0]):
            for j in range(size[1]):
                at = source(i, 4, size[0], corners), source(j, 3, size[1], corners)
                values = [sample(each.double().tolist(), *at) for each in maps[n]]
                assert max(values) - values[found[n, i, j]] < 1e-5


@settings(max_examples=60, deadline=None)
@given(*[st.integers(1, 20)] * 6, st.integers(0, 3), st.booleans(), st.booleans())
def test_agrees_with_pytorch(classes, h, w, height, width, lanes, n, corners, last):
    maps = torch.randn(n, classes, h, w * lanes)
    if last:
        maps = maps.contiguous(memory_format=torch.channels_last)
    size = height, width * lanes
    found = upsampled_argmax(maps, size, corners, impl="native")
    expected = upsampled_argmax(maps, size, corners, impl="reference")
    assert found.dtype == expected.dtype
    large = F.interpolate(maps.double(), size, mode="bilinear", align_corners=corners)
    chosen, best = (large.gather(1, x[:, None]) for x in (found, expected))
    torch.testing.assert_close(chosen, best, rtol=0, atol=2e-5)


def test_the_first_of_equal_classes_wins():
    assert (upsampled_argmax(torch.zeros(1, 3, 2, 2), (40, 40), True, impl="native") == 0).all()
    maps = torch.tensor([0.0, 1.0, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert (upsampled_argmax(maps, (40, 40), False, impl="native") == 1).all()


def test_refuses_what_it_cannot_enlarge():
    for maps in (torch.zeros(1, 0, 2, 2), torch.zeros(1, 2, 0, 2), torch.zeros(2, 2, 2)):
        with pytest.raises(RuntimeError, match="upsampled_argmax: expected"):
            torch.ops.stylegan.upsampled_argmax(maps, 4, 4, False)
    with pytest.raises(RuntimeError, match="would be"):
        torch.ops.stylegan.upsampled_argmax(torch.zeros(1, 1, 2, 2), 0, 4, False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_take_the_reference(dtype):
    maps = torch.randn(1, 4, 3, 3, dtype=dtype)
    expected = upsampled_argmax(maps, (6, 6), False, impl="reference")
    assert torch.equal(upsampled_argmax(maps, (6, 6), False), expected)
