"""Pytest plugin: ``stylegan``'s CPU operators run the emulated CUDA kernels.

pytest -p tests.cuda_emulation.override tests/test_native_ops.py
"""

import pytest
import torch

from Model.ops import dispatch
from tests import cuda_emulation


@pytest.fixture(autouse=True, scope="session")
def _kernels():
    assert dispatch.why_not("cpu") is None
    emulation = cuda_emulation.load()
    kernels = torch.library.Library("stylegan", "IMPL")
    for name in cuda_emulation.OPERATORS:
        kernels.impl(name, getattr(torch.ops.stylegan_emulated, name).default, "CPU")
    emulation.emulation_fence(True)
    yield
    emulation.emulation_fence(False)
    kernels._destroy()
    assert emulation.emulation_launches() > 0
    assert emulation.emulation_broken_fences() == 0
