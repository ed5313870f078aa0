"""The CUDA kernels on the CPU: translated to C++, built once and loaded as ``stylegan_emulated``.

``emulator.h`` stands in for the GPU and says what it checks; this module rewrites what is not C++.
"""

import ctypes
import functools
import os
import re
from pathlib import Path

import torch

from Model.ops import build

# Another folder of sources, and further compiler flags: for tests of the emulation itself.
SOURCES = Path(os.environ.get("CUDA_EMULATION_SOURCES", build.SOURCES))
FLAGS = tuple(os.environ.get("CUDA_EMULATION_FLAGS", "").split())

OPERATORS = ("fused_leaky_relu", "fused_leaky_relu_backward", "upfirdn2d", "filtered_leaky_relu")
HERE = Path(__file__).parent
REWRITES = {
    r"#include <(c10/cuda/\w+|cuda_runtime_api)\.h>": '#include "emulator.h"',
    r"TORCH_LIBRARY_IMPL\(stylegan, CUDA,": "TORCH_LIBRARY_IMPL(stylegan_emulated, CPU,",
    # A function is a coroutine if it says co_return, even where it never does.
    r"__global__ void (?:__launch_bounds__\(\w+\) )?(\w+\([^{]*\) \{)": (
        r"emulation::Thread \1 if (false) co_return;"
    ),
    r"((?:\w+::)*\w+(?:<[^<>;]*>)?)\s*<<<(.*?)>>>": r"emulation::launch(\1, \2)",
    r"extern __shared__ unsigned char (\w+)\[\];": (
        r"unsigned char* \1 = emulation::dynamic_shared();"
    ),
    r"__shared__ (\w+) (\w+)((?:\[\w+\])+);": (
        r"auto& \2 = emulation::shared_array<\1\3>(__LINE__);"
    ),
    # Caps that only huge tensors reach are variables here.
    r"constexpr int64_t (kMost\w+)": r"int64_t \1",
}
LIMITS = """
extern "C" void emulation_limits(int64_t blocks, int64_t samples, int64_t indexed) {
  stylegan::kMostBlocks = blocks, stylegan::kMostSamples = samples;
  stylegan::kMostIndexed32 = indexed;
}
"""


def _translated(name: str) -> str:
    text = (SOURCES / name).read_text()
    for pattern, by in REWRITES.items():
        text = re.sub(pattern, by, text, flags=re.DOTALL)
    return f'#line 1 "{SOURCES / name}"\n{text}'


def library() -> Path:
    """The kernels for this CPU, built if they are not in the cache yet.

    Raises:
        BuildError: they can not be built.
    """
    names = ("arithmetic.h", "tensors.h", "kernels.h", "kernels.cu", "cuda.cpp")
    files = {name: _translated(name) for name in names}
    files["kernels.cpp"] = files.pop("kernels.cu") + LIMITS
    for name in ("emulator.h", "control.cpp"):
        files[name] = (HERE / name).read_text()
    command = (build.compiler(), "-std=c++20", "-O1", "-fPIC", *FLAGS)

    def make(target: Path) -> None:
        for name, text in files.items():
            target.with_name(name).write_text(text)
        sources = {target.with_name(name): command for name in files if name.endswith(".cpp")}
        build.compile_library(target, sources, *FLAGS)

    return build.build_once(f"emulated-cuda_{build.key(*command, *files.values())}", make)


@functools.cache
def load() -> ctypes.CDLL:
    """Load the kernels as operators of their own, with the schemas of the CPU's.

    Raises:
        BuildError: they can not be built.
    """
    path = library()
    namespace = torch.library.Library("stylegan_emulated", "DEF")
    for name in OPERATORS:
        schema = getattr(torch.ops.stylegan, name).default._schema
        namespace.define(str(schema).removeprefix("stylegan::"))
    load.namespace = namespace  # its operators end with it
    torch.ops.load_library(path)
    emulation = ctypes.CDLL(str(path))
    emulation.emulation_limits.argtypes = [ctypes.c_int64] * 3
    return emulation
