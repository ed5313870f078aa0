"""The CUDA kernels, run on the CPU by `tests.cuda_emulation`, against the CPU operators."""

import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from Model.ops import build, dispatch
from tests import cuda_emulation
from tests.test_native_ops import LAYOUTS, TOLERANCE, epilogue, taps, values

CASES = 300
SEEDS = pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 41))]
)
# Blocks, samples in a grid, elements with 32-bit indices: a GPU's, and so few that loops go round.
USUAL, TIGHT = (1 << 20, 65535, 2**31 - 1 - (256 << 20)), (2, 1, 0)


@pytest.fixture(scope="module")
def emulation():
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)
    library = cuda_emulation.load()
    library.emulation_fence(True)
    yield library
    library.emulation_limits(*USUAL)
    library.emulation_fence(False)


def cases(emulation, seed):
    """Sources of random choices, one for each case, with the emulation set up at random too."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    for _ in range(CASES):
        emulation.emulation_seed(rng.getrandbits(32))
        emulation.emulation_limits(*rng.choice([USUAL, TIGHT]))
        yield rng


def compare(emulation, operator, *args):
    """Both forms of an operator agree in values and layout, and no kernel writes elsewhere."""
    launches = emulation.emulation_launches()
    expected = getattr(torch.ops.stylegan, operator)(*args)
    actual = getattr(torch.ops.stylegan_emulated, operator)(*args)
    if not isinstance(actual, tuple):
        actual, expected = (actual,), (expected,)
    assert (emulation.emulation_launches() > launches) == (expected[0].numel() > 0)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.stride() == theirs.stride()
        if theirs.numel() == 0:
            continue
        # A sum of n values of about 1 is as large as sqrt(n) on the way, whatever it ends at.
        spread = max(1, args[0].numel() / ours.numel()) ** 0.5
        bound = TOLERANCE[ours.dtype]["rtol"] * (spread + float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
    del actual, ours
    assert emulation.emulation_broken_fences() == 0


def draw_input(rng, side):
    """Random values of any type, layout and size up to 3 x 70 x side x side."""
    dtype, layout = rng.choice(list(TOLERANCE)), rng.choice(LAYOUTS)
    n, c = int(rng.random() < 0.95) * rng.randint(1, 3), rng.randint(1, rng.choice([4, 70]))
    return values(n, c, rng.randint(1, side), rng.randint(1, side), dtype=dtype, layout=layout)


def draw_epilogue(rng, x, *pixels):
    """Each parameter, or None: bias, noise (for all or for each sample), strength, gain."""
    n, c = x.shape[:2]
    parameters = epilogue(n, c, pixels, x.dtype, maps=rng.choice([1, n]))
    return [t if rng.random() < 0.7 else None for t in parameters.tensors]


@SEEDS
def test_activation_equals_the_cpu_operator(emulation, seed):
    for rng in cases(emulation, seed):
        x = draw_input(rng, 20)
        if rng.random() < 0.2:  # any number of dimensions
            x = rng.choice([x[:, :, 0, 0], x[:, :, :, 0], x[:, :, None]])
        parameters = draw_epilogue(rng, x, *x.shape[2:])
        compare(emulation, "fused_leaky_relu", x, *parameters, 0.3, 1.4)


@SEEDS
def test_gradient_of_the_activation_equals_the_cpu_operator(emulation, seed):
    for rng in cases(emulation, seed):
        y = draw_input(rng, 40)  # up to seven pieces of pixels, nine groups of channels
        grad, x = (values(*y.shape, dtype=y.dtype, layout=rng.choice(LAYOUTS)) for _ in range(2))
        gain = rng.choice([None, torch.randn(y.shape[:2]).to(y.dtype)])
        x = rng.choice([None, x])
        by_pixel = rng.random() < 0.7
        compare(emulation, "fused_leaky_relu_backward", grad, y, x, gain, 0.3, 1.4, by_pixel)


def test_sums_by_pixel_that_nobody_reads_take_no_kernel(emulation):
    y, kernels = torch.randn(2, 3, 4, 5), []
    for by_pixel in (False, True):
        before = emulation.emulation_launches()
        compare(emulation, "fused_leaky_relu_backward", y, y, None, None, 0.2, 1.0, by_pixel)
        kernels.append(emulation.emulation_launches() - before)
    assert kernels == [1, 2]


@SEEDS
def test_filter_equals_the_cpu_operator(emulation, seed):
    for rng in cases(emulation, seed):
        x = draw_input(rng, 15)
        size, up, down = rng.choice([(4, 1, 1), (4, 2, 1), (4, 1, 2), None]) or (
            rng.randint(1, 7), rng.randint(1, 3), rng.randint(1, 3)
        )  # fmt: skip
        kernel, pad = taps(size, rng.random() < 0.5), rng.randint(-3, 6)
        height, width = (
            max(0, (side * up + pad + rng.randint(-3, 6) - size) // down + 1)
            for side in x.shape[2:]
        )
        flip = rng.random() < 0.5
        compare(emulation, "upfirdn2d", x, kernel, up, down, pad, height, width, flip)


@SEEDS
def test_filter_with_activation_equals_the_cpu_operator(emulation, seed):
    for rng in cases(emulation, seed):
        x, kernel = draw_input(rng, 15), taps(rng.choice([4, 4, 1, 3, 6]), rng.random() < 0.5)
        pad = rng.randint(-1, 4)
        height, width = (
            max(0, side + pad + rng.randint(0, 4) - len(kernel) + 1) for side in x.shape[2:]
        )
        parameters = draw_epilogue(rng, x, height, width)
        compare(
            emulation, "filtered_leaky_relu", x, kernel, pad, height, width, *parameters, 0.3, 1.4
        )


@pytest.mark.slow
def test_more_channels_than_a_grid_has_rows(emulation):
    # One block for eight channels: 65,537 blocks, two more than the y axis of a grid takes.
    y = torch.randn(1, 8 * 65536 + 1, 1, 2)
    compare(
        emulation, "fused_leaky_relu_backward", torch.randn_like(y), y, None, None, 0.2, 1.0, True
    )


# --- The emulation itself -------------------------------------------------------------------------

MUTANTS = {
    "sums written before the last are read": ("__syncthreads();  // until", "// until"),
    "sums read before they are written": ("__syncthreads();\n      writes", "writes"),
    "a filter read before it is written": ("__syncthreads();\n  const I inner", "const I inner"),
    "half of a warp": ("k = kLanes / 2; k > 0", "k = kLanes / 4; k > 0"),
    "one element too many": ("i < elements;", "i <= elements;"),
    "elements left out": ("i += step)", "i += step + 1)"),
    "pixels of the next piece": ("< pixels ? begin + kPiece : pixels", "< 0 ? 0 : begin + kPiece"),
    "all pieces in one place": ("(n * pieces + piece) *", "n * pieces *"),
    "the pixels of another sample": ("pixel % pixels}", "pixel}"),
    "the first channel for all": ("x + image * area + c,", "x + image * area,"),
    "a filter not turned": ("flip ? i : count - 1 - i", "i"),
    "a launch that fails": ("const dim3 block(kLanes, kRows)", "const dim3 block(kLanes, 40)"),
}


def failures(*arguments, **environment):
    """What pytest, run on its own, prints up to the first failure; None if all passes."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *arguments]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True
    )
    return None if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache for builds that nobody needs again."""
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture
def mutated(tmp_path):
    """Puts a mistake into a copy of the kernels; returns what makes the emulation take it."""

    def make(mutant):
        shutil.copytree(cuda_emulation.SOURCES, tmp_path, dirs_exist_ok=True)
        kernels = tmp_path / "kernels.cu"
        right, (before, after) = kernels.read_text(), MUTANTS[mutant]
        assert before in right
        kernels.write_text(right.replace(before, after, 1))
        return {"CUDA_EMULATION_SOURCES": str(tmp_path)}

    return make


@pytest.mark.slow
def test_the_cpu_operators_tests_pass_through_the_kernels():
    printed = failures("-p", "tests.cuda_emulation.override", "tests/test_native_ops.py")
    assert printed is None, printed


@pytest.mark.slow
def test_sanitizers_find_mistakes_and_there_are_none(cache, mutated):
    runtime = subprocess.run(
        [build.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    environment = cache | {
        "CUDA_EMULATION_FLAGS": "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    printed = failures(__file__, **environment)
    assert printed is None, printed
    printed = failures(__file__, "-s", **environment, **mutated("one element too many"))
    assert "AddressSanitizer: heap-buffer-overflow" in printed


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistakes_in_the_kernels_are_found(mutant, cache, mutated):
    printed = failures(__file__, **cache, **mutated(mutant))
    assert printed is not None
    assert re.search(r"^FAILED|Fatal Python error", printed, re.MULTILINE), printed
