"""The rule by which the golden networks were filled (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).parent / "golden"


def _scaled(key: str, a: np.ndarray, parser: bool) -> np.ndarray:
    if key.endswith("modulation.bias"):
        return 1 + 0.1 * a
    if key.endswith("noise.weight"):
        return 0.1 * a
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(a)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * a
    if "bn" in key and key.endswith("weight") and a.ndim == 1:
        return 1 + 0.1 * a
    if key.startswith("style."):
        return 100 * a
    if parser and a.ndim == 4:
        return a * np.sqrt(2 / np.prod(a.shape[1:]))
    return a


def fill_from_numpy(module: nn.Module, seed: int, parser: bool = False) -> None:
    """Fill a network in place from NumPy, in the order of its sorted tensor names."""
    rng = np.random.default_rng(seed)
    state = module.state_dict()
    for key in sorted(state):
        if key.endswith(("kernel", "num_batches_tracked")):
            continue
        a = rng.standard_normal(tuple(state[key].shape)).astype(np.float32)
        state[key] = torch.from_numpy(np.asarray(_scaled(key, a, parser), dtype=np.float32))
    module.load_state_dict(state)


def load_golden(name: str) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays of tests/golden/NAME.npz and its spec."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("spec", "{}")))


def assert_golden(actual: Tensor, arrays: dict[str, np.ndarray], name: str, rtol=1e-4) -> None:
    """Compare with a golden array, relative to its largest value, or with its samples."""
    actual = actual.detach()
    if name in arrays:
        expected = torch.as_tensor(arrays[name])
        assert actual.shape == expected.shape
    else:
        assert tuple(actual.shape) == tuple(arrays[f"{name}__shape"])
        mean, std = arrays[f"{name}__moments"]
        torch.testing.assert_close(actual.double().mean().item(), mean, rtol=1e-4, atol=1e-4 * std)
        torch.testing.assert_close(actual.double().std().item(), std, rtol=1e-3, atol=0.0)
        actual = actual.flatten()[torch.as_tensor(arrays[f"{name}__index"])]
        expected = torch.as_tensor(arrays[f"{name}__sample"])
    tolerance = rtol * expected.abs().max().item()
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=tolerance)
