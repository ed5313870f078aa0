import os

import numpy as np
import pytest
import torch
from PIL import Image

from Model.generator import Generator
from tests.golden_fill import fill_from_numpy, load_golden
from Util import progress


@pytest.fixture(params=["generator_32px", "generator_64px"])
def golden(request) -> tuple[Generator, dict]:
    """A generator filled as the original was, and what the original made of it."""
    arrays, spec = load_golden(request.param)
    generator = Generator(spec["size"], spec["style_dim"], spec["n_mlp"], spec["channels"])
    fill_from_numpy(generator, spec["seed"])
    return generator.requires_grad_(False), arrays


def pytest_configure():
    torch.set_num_threads(1)  # the networks are tiny; more threads wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same in the processes that tests start


@pytest.fixture
def terminal(monkeypatch):
    """Progress is a bar, as on a terminal."""
    monkeypatch.setattr(progress, "is_terminal", lambda: True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def folder(tmp_path):
    """A folder with five training pictures of 8 px in data/."""
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(5):
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i}.png")
    return tmp_path
