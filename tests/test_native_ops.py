"""The compiled operators against the plain ones, and how they are built and chosen."""

import errno
import re
import stat
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from Compression.losses import path_length_penalty
from Model.discriminator import Discriminator
from Model.generator import Generator
from Model.ops import (
    Epilogue,
    apply_epilogue,
    build,
    convolution,
    dispatch,
    filtered_leaky_relu,
    fused_leaky_relu,
    make_kernel,
    upfirdn2d,
)
from Model.ops.upfirdn2d import filtered_size
from tests.golden_fill import assert_golden

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ],
)
DEVICES = pytest.mark.parametrize("device", ["cpu", GPU])
LAYOUTS = ["contiguous", "channels_last", "sliced", "channels_last_sliced"]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
TYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda t: str(t).removeprefix("torch."))


@pytest.fixture(autouse=True, scope="module")
def _built():
    if reason := dispatch.why_not("cpu"):
        pytest.skip(reason)


def values(*shape, dtype=torch.float64, layout="contiguous", device="cpu"):
    """Random values in one of the memory layouts."""
    wide = (*shape[:-1], 2 * shape[-1]) if "sliced" in layout else shape
    x = torch.randn(wide, dtype=torch.float64).to(device, dtype)
    if layout.startswith("channels_last"):
        x = x.to(memory_format=torch.channels_last)
    return x[..., ::2] if "sliced" in layout else x


def taps(size, separable, dtype=torch.float64, device="cpu"):
    k = torch.randn(size, size, dtype=torch.float64)
    if separable:
        k = torch.outer(k[0], k[:, 0])
    return k.to(device, dtype)


def epilogue(n, c, pixels, dtype, device="cpu", maps=None):
    def one(*shape):
        return torch.randn(shape, dtype=torch.float64).to(device, dtype)

    noise = one(n if maps is None else maps, 1, *pixels)
    return Epilogue(one(c), noise, one(1), one(n, c))


def exact(function, x, *args):
    """The reference in double precision, in x's type."""
    args = [a.to(torch.float64) if isinstance(a, torch.Tensor | Epilogue) else a for a in args]
    return function(x.double(), *args, impl="reference").to(x.dtype)


FILTERS = [
    (4, 1, 1, (1, 1)), (4, 1, 1, (2, 1)), (4, 2, 1, (2, 1)), (4, 1, 2, (1, 1)), (4, 1, 2, (2, 2)),
    (3, 2, 1, (0, 0)), (3, 3, 2, (1, 2)), (1, 2, 1, (0, 1)), (2, 4, 3, (3, 0)), (6, 2, 2, (-1, 5)),
    (4, 1, 1, (-1, 2)), (4, 2, 1, (-2, -1)), (4, 2, 1, (5, 4)), (7, 1, 1, (8, -2)),
]  # fmt: skip


@DEVICES
@TYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upfirdn2d_equals_the_reference(layout, dtype, device):
    x = values(2, 5, 7, 6, dtype=dtype, layout=layout, device=device)
    for size, up, down, pad in FILTERS:
        for separable in (True, False):
            kernel = taps(size, separable, torch.float64, device)
            actual = upfirdn2d(x, kernel, up, down, pad, "native")
            expected = exact(upfirdn2d, x, kernel, up, down, pad)
            scale = float(kernel.abs().sum()) + 1
            tolerance = {k: v * scale for k, v in TOLERANCE[dtype].items()}
            torch.testing.assert_close(actual, expected, **tolerance)


@DEVICES
@TYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_apply_epilogue_equals_the_reference(layout, dtype, device):
    x = values(3, 5, 4, 6, dtype=dtype, layout=layout, device=device)
    for maps in (1, 3):
        parameters = epilogue(3, 5, (4, 6), dtype, device, maps)
        names = Epilogue._fields[:4]
        for left_out in ((), *((name,) for name in names), names):
            some = parameters._replace(negative_slope=0.3, **dict.fromkeys(left_out))
            actual = apply_epilogue(x, some, "native")
            expected = exact(apply_epilogue, x, some)
            torch.testing.assert_close(actual, expected, **TOLERANCE[dtype])


@DEVICES
@TYPES
@pytest.mark.parametrize("layout", LAYOUTS)
def test_filtered_leaky_relu_is_the_two_in_turn(layout, dtype, device):
    x = values(2, 5, 7, 6, dtype=dtype, layout=layout, device=device)
    for separable in (True, False):
        kernel, parameters = taps(4, separable), epilogue(2, 5, (6, 5), dtype, device)
        kernel = kernel.to(device)
        actual = filtered_leaky_relu(x, kernel, (1, 1), parameters, "native")
        expected = exact(filtered_leaky_relu, x, kernel, (1, 1), parameters)
        tolerance = {k: 20 * v for k, v in TOLERANCE[dtype].items()}
        torch.testing.assert_close(actual, expected, **tolerance)


def test_a_trained_filter_has_its_gradient():
    x, kernel = values(2, 3, 7, 6), taps(4, True).requires_grad_()
    parameters = epilogue(2, 3, (6, 5), torch.float64)
    results = [
        filtered_leaky_relu(x, kernel, (1, 1), parameters, impl) for impl in ("native", "reference")
    ]
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), kernel) for y in results))


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3), (2, 5, 3, 2, 2), (0, 5), (0, 5, 3, 3)])
def test_fused_leaky_relu_takes_any_number_of_dimensions(shape):
    x, bias = torch.randn(shape, requires_grad=True), torch.randn(5, requires_grad=True)
    results = [fused_leaky_relu(x, bias, impl=impl) for impl in ("native", "reference")]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), (x, bias)) for y in results))


def test_empty_batches_and_inputs():
    kernel = make_kernel()
    assert upfirdn2d(torch.zeros(0, 3, 8, 8), kernel, 2, 1, (2, 1), "native").shape[2:] == (16, 16)
    padding = upfirdn2d(torch.zeros(1, 3, 0, 4), kernel, pad=(3, 3), impl="native")
    torch.testing.assert_close(padding, torch.zeros(1, 3, 3, 7))


def test_layouts_are_kept():
    x = torch.randn(2, 4, 8, 8).to(memory_format=torch.channels_last)
    for y in (
        upfirdn2d(x, make_kernel(), 2, 1, (2, 1), "native"),
        fused_leaky_relu(x, impl="native"),
    ):
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert not y.is_contiguous()


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    size=st.integers(1, 6), up=st.integers(1, 4), down=st.integers(1, 4),
    pad=st.tuples(st.integers(-3, 7), st.integers(-3, 7)),
    layout=st.sampled_from(LAYOUTS), separable=st.booleans(),
)  # fmt: skip
@example((1, 1, 1, 1), 1, 3, 1, (-2, 0), "contiguous", False)  # its gradient crops its own zeros
@example((1, 1, 2, 2), 1, 1, 1, (-3, 4), "contiguous", False)  # nothing but zeros is left
def test_upfirdn2d_of_any_shape(shape, size, up, down, pad, layout, separable):
    x = values(*shape, layout=layout).requires_grad_()
    kernel = taps(size, separable)
    assume(min(shape[2:]) * up + sum(pad) >= size)
    actual, expected = (upfirdn2d(x, kernel, up, down, pad, i) for i in ("native", "reference"))
    torch.testing.assert_close(actual, expected)
    direction = torch.randn_like(expected)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * direction).sum(), x) for y in (actual, expected))
    )


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES,
    layout=st.sampled_from(LAYOUTS), shared=st.booleans(),
)  # fmt: skip
def test_activation_of_any_shape(shape, layout, shared):
    n, c, *pixels = shape
    x = values(*shape, layout=layout).requires_grad_()
    parameters = epilogue(n, c, pixels, torch.float64, maps=1 if shared else n)
    wanted = (x, *(p.requires_grad_() for p in parameters.tensors))
    results = [apply_epilogue(x, parameters, i) for i in ("native", "reference")]
    torch.testing.assert_close(*results)
    direction = torch.randn_like(results[1])
    torch.testing.assert_close(
        *(torch.autograd.grad((y * direction).sum(), wanted) for y in results)
    )


@DEVICES
@TYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_many_pieces_equal_the_reference(layout, dtype, device):
    # More values than one piece of work takes (csrc/cpu.cpp), so partial sums are added up.
    x = values(2, 20, 65, 50, dtype=dtype, layout=layout, device=device).requires_grad_()
    parameters = epilogue(2, 20, (65, 50), dtype, device, 1)
    wanted = (x, *(p.requires_grad_() for p in parameters.tensors))
    y = apply_epilogue(x, parameters, "native")
    grads = torch.autograd.grad(y.square().sum() / 100, wanted)  # half ends at 65504
    double = [t.detach().double().requires_grad_() for t in wanted]
    z = apply_epilogue(double[0], Epilogue(*double[1:]), "reference")
    expected = torch.autograd.grad(z.square().sum() / 100, double)
    error = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 5e-2)
    for actual, exactly in zip(grads, expected, strict=True):
        assert (actual.double() - exactly).abs().max() <= error * exactly.abs().max()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_do_not_depend_on_the_number_of_threads(layout):
    x = values(2, 33, 64, 64, dtype=torch.float32, layout=layout).requires_grad_()
    parameters = epilogue(2, 33, (63, 63), torch.float32)
    wanted = (x, *(p.requires_grad_() for p in parameters.tensors))
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y = filtered_leaky_relu(x, make_kernel(), (1, 1), parameters, "native")
        runs.append((y, *torch.autograd.grad(y.square().sum(), wanted)))
    torch.set_num_threads(threads)
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=0, atol=0)


# --- Derivatives and registration -----------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("up", "down", "pad"), [(1, 1, (2, 1)), (2, 1, (2, 1)), (1, 2, (-1, 2))])
def test_upfirdn2d_is_differentiable_twice(up, down, pad, layout):
    x, kernel = values(2, 2, 4, 5, layout=layout).requires_grad_(), taps(4, False)

    def function(x):
        return upfirdn2d(x, kernel, up, down, pad, "native")

    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(lambda x: function(x).square(), x)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("maps", [1, 2])
def test_epilogues_are_differentiable_twice(layout, maps):
    x, kernel = values(2, 3, 4, 5, layout=layout).requires_grad_(), taps(4, True)

    def filtered(x, *rest):
        return filtered_leaky_relu(x, kernel, (1, 1), *rest)

    for pixels, function in (((4, 5), apply_epilogue), ((3, 4), filtered)):
        parameters = epilogue(2, 3, pixels, torch.float64, maps=maps)
        wanted = (x, *(p.requires_grad_() for p in parameters.tensors))

        def run(x, *rest, function=function):
            return function(x, Epilogue(*rest), "native")

        assert torch.autograd.gradcheck(run, wanted)
        assert torch.autograd.gradgradcheck(lambda *w, run=run: run(*w).square(), wanted)


class SumsByPixel(TorchDispatchMode):
    """Writes down whether the gradients of activations ask for them."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.stylegan.fused_leaky_relu_backward.default:
            self.asked.append(args[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("filtered", [False, True])
def test_sums_by_pixel_are_asked_for_where_noise_or_its_strength_learns(filtered):
    names = ("x", "bias", "noise", "noise_strength")
    x = torch.randn(2, 3, 4, 4)
    noise = torch.randn(1, 1, 3, 3) if filtered else torch.randn(1, 1, 4, 4)
    given = dict(zip(names, (x, torch.randn(3), noise, torch.randn(1)), strict=True))
    for learns in names:
        tensors = {name: t.clone().requires_grad_(name == learns) for name, t in given.items()}
        start, rest = tensors.pop("x"), Epilogue(**tensors)
        if filtered:
            y = filtered_leaky_relu(start, make_kernel(), (1, 1), rest, "native")
        else:
            y = apply_epilogue(start, rest, "native")
        with SumsByPixel() as sums:
            y.sum().backward()
        assert sums.asked == [learns in ("noise", "noise_strength")]


def test_the_third_derivative_is_there_too():
    x = values(1, 2, 3, 3).requires_grad_()

    def slope(x):
        y = apply_epilogue(x, Epilogue(gain=x[:, :, 0, 0]), "native").pow(3).sum()
        return torch.autograd.grad(y, x, create_graph=True)[0]

    assert torch.autograd.gradgradcheck(slope, x)


def test_operators_are_registered_as_pytorch_asks():
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    bias, noise, strength, gain = (
        torch.randn(s, requires_grad=True) for s in ((3,), (1, 1, 6, 6), (1,), (2, 3))
    )
    kernel, ops = make_kernel(), torch.ops.stylegan
    tail = (bias, noise, strength, gain, 0.2, 1.4)
    for operator, args in (
        (ops.upfirdn2d, (x, kernel, 2, 1, 2, 12, 12, False)),
        (ops.upfirdn2d, (x.detach()[:, :, 1:], kernel, 1, 2, 1, 2, 3, True)),
        (ops.fused_leaky_relu, (x, *tail)),
        (ops.fused_leaky_relu, (x[:, :, 0, 0], bias, None, None, None, 0.2, 1.4)),
        (ops.fused_leaky_relu_backward, (x, x.detach(), x, gain, 0.2, 1.4, True)),
        (ops.fused_leaky_relu_backward, (x, x.detach(), None, None, 0.2, 1.4, False)),
        (ops.filtered_leaky_relu, (x, taps(1, True), 0, 6, 6, *tail)),
    ):
        torch.library.opcheck(operator.default, args)


def test_torch_compile_traces_without_a_graph_break(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    torch.compiler.reset()
    generator = Generator(16, style_dim=8, n_mlp=1, channels=(6, 5, 4, 4, 3, 3))
    discriminator = Discriminator(16, channels=(6, 5, 4))

    def step(z):
        return discriminator(generator([z], randomize_noise=False))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    z = torch.randn(2, 8)
    for function in (step, compiled):
        generator.zero_grad()
        function(z).sum().backward()
        grads = [p.grad for p in generator.parameters()]
        if function is step:
            expected = grads
    torch.testing.assert_close(compiled(z), step(z))
    torch.testing.assert_close(grads, expected)


# --- Networks -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["native", "reference"])
def test_golden_images_and_path_lengths(golden, monkeypatch, mode):
    monkeypatch.setenv(dispatch.VARIABLE, mode)
    monkeypatch.setattr(convolution, "_pays", lambda *_: True)
    generator, arrays = golden
    z = torch.as_tensor(arrays["z1"])
    assert_golden(generator([z], randomize_noise=False), arrays, "image")
    conv1 = generator.conv1.conv.weight.requires_grad_()
    w_plus = generator.w_plus([z]).detach().requires_grad_()
    penalty, _, _ = path_length_penalty(
        generator.synthesis(w_plus, "fixed").image, w_plus, torch.tensor(0.3), decay=0.01,
        noise=torch.as_tensor(arrays["path_noise"]),
    )  # fmt: skip
    assert_golden(torch.autograd.grad(penalty, conv1)[0], arrays, "path_penalty_grad_conv1")


def test_networks_differ_by_rounding_only(monkeypatch):
    discriminator = Discriminator(64, channels=(24, 20, 16, 12, 10))
    images = torch.randn(4, 3, 64, 64, requires_grad=True)
    penalties = []
    monkeypatch.setattr(convolution, "_pays", lambda *_: True)
    for mode in ("native", "reference"):
        monkeypatch.setenv(dispatch.VARIABLE, mode)
        logits = discriminator(images)
        (grad,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
        penalty = grad.square().sum()
        weights = torch.autograd.grad(penalty, list(discriminator.parameters()), allow_unused=True)
        penalties.append((logits, penalty, weights))
    torch.testing.assert_close(*penalties, rtol=1e-3, atol=1e-5)


# --- Choice and building --------------------------------------------------------------------------


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """A process that has loaded nothing yet, with an empty cache."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr("Model.ops.native._loaded", set())
    caches = (dispatch.why_not, dispatch._warn)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def program(file: Path, body: str) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def compiler_script(folder: Path, body: str) -> str:
    return program(folder / "compiler", body)


LARGE = torch.ones(1, 1, 256, 256)


def test_without_a_compiler_there_is_one_warning_and_the_reference(unbuilt, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match="no CXX=no-such-compiler on this machine; install"):
        fused_leaky_relu(LARGE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        upfirdn2d(LARGE, make_kernel())
    with pytest.raises(dispatch.NativeUnavailable, match="no-such-compiler"):
        upfirdn2d(LARGE, make_kernel(), impl="native")


def test_a_failing_compiler_is_reported_in_short_and_remembered(unbuilt, monkeypatch):
    count = unbuilt / "count"
    body = f'echo x >> {count}; yes "note: blah" | head -500\necho "f.cpp:1: error: oh no"; exit 1'
    script = compiler_script(unbuilt, body)
    monkeypatch.setenv("NVCC", "no-such-compiler")
    monkeypatch.setenv("CXX", script)
    for _ in range(2):
        with pytest.raises(build.BuildError, match=r"failed: f.cpp:1: error: oh no \(all") as error:
            build.library("cpu")
        assert len(str(error.value)) < 400
    assert count.read_text().count("x") == 2  # each of two sources once
    assert build.main([]) == 1  # tries again
    assert count.read_text().count("x") > 2


@pytest.mark.parametrize(
    ("ended", "said"),
    [
        ("kill -TERM $$", "signal 15"),
        (
            "echo 'g++: fatal error: Killed signal terminated program cc1plus'; exit 1",
            "by a signal",
        ),
    ],
)
def test_a_compiler_ended_from_outside_is_tried_again(unbuilt, monkeypatch, ended, said):
    monkeypatch.setenv("CXX", compiler_script(unbuilt, ended))
    with pytest.raises(build.BuildError, match=said):
        build.library("cpu")
    body = 'while [ "$1" != -o ]; do shift; done; echo lib > "$2"'
    monkeypatch.setenv("CXX", compiler_script(unbuilt, body))
    assert build.library("cpu").read_text() == "lib\n"


def test_a_cache_without_locks_is_built_in(unbuilt, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    body = 'while [ "$1" != -o ]; do shift; done; echo lib > "$2"'
    monkeypatch.setenv("CXX", compiler_script(unbuilt, body))
    assert build.library("cpu").read_text() == "lib\n"


def test_processes_that_build_at_once_build_once(unbuilt, monkeypatch):
    count = unbuilt / "count"
    body = f'echo x >> {count}; sleep 0.2; while [ "$1" != -o ]; do shift; done; echo lib > "$2"'
    monkeypatch.setenv("CXX", compiler_script(unbuilt, body))
    with ThreadPoolExecutor(4) as pool:
        paths = {job.result() for job in [pool.submit(build.library, "cpu") for _ in range(4)]}
    (path,) = paths
    assert path.read_text() == "lib\n"
    assert count.read_text().count("x") == 3  # two sources compiled, and linked
    assert sorted(p.suffix for p in path.parent.iterdir()) == ["", ".so"]  # the lock, the library


def test_a_library_that_does_not_load_means_the_reference(unbuilt, monkeypatch):
    body = 'while [ "$1" != -o ]; do shift; done; echo no library > "$2"'
    monkeypatch.setenv("CXX", compiler_script(unbuilt, body))
    with pytest.warns(RuntimeWarning, match="no compiled operators for CPU"):
        fused_leaky_relu(LARGE)


def test_a_home_that_can_not_be_written_means_the_temporary_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert build.cache_folder().parent == tmp_path


def test_the_variable_decides_for_auto(unbuilt, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused_leaky_relu(LARGE)
    monkeypatch.setenv(dispatch.VARIABLE, "native")
    with pytest.raises(dispatch.NativeUnavailable):
        fused_leaky_relu(torch.ones(1, 1))
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="STYLEGAN_OPS must be"):
        fused_leaky_relu(LARGE)


def test_small_tensors_with_a_gradient_are_not_worth_it_on_a_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "_available", lambda part: True)
    with FakeTensorMode():
        for device, sides in (("cpu", {8: False, 256: True}), ("cuda", {8: True, 256: True})):
            for side, native in sides.items():
                x = torch.empty(1, 1, side, side, device=device)
                assert dispatch.use_native("upfirdn2d", "auto", x)
                assert dispatch.use_native("upfirdn2d", "auto", x.requires_grad_()) == native


def test_importing_builds_nothing(tmp_path):
    code = "import Model.layers, Model.ops, sys; sys.exit('Model.ops.native' in sys.modules)"
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=environment).returncode == 0
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_named():
    x = torch.zeros(2, 3, 4, 4)
    for match, more in (
        ("bias must have 1 \\* 3 elements", {"bias": torch.zeros(4)}),
        ("gain must have 2 \\* 3", {"gain": torch.zeros(2, 4)}),
        ("noise must have 1 \\* 16", {"noise": torch.zeros(1, 1, 4, 5)}),
        ("must be positive", {"negative_slope": 0.0}),
    ):
        with pytest.raises(RuntimeError, match=match):
            apply_epilogue(x, Epilogue(**more), "native")
    backward = torch.ops.stylegan.fused_leaky_relu_backward
    for wrong in (x[:1], x.double()):
        for grad, y, inputs in ((wrong, x, None), (x, x, wrong)):
            with pytest.raises(RuntimeError, match=r"expected \[2, 3, 4, 4\] of Float"):
                backward(grad, y, inputs, None, 0.2, 1.0, True)
    for impl in ("native", "reference"):
        with pytest.raises(ValueError, match="does not fit"):
            upfirdn2d(x, make_kernel(), pad=(-1, 0), impl=impl)
    assert filtered_size(x, make_kernel(), 1, 1, (0, 0)) == (1, 1)


# --- The CUDA library -----------------------------------------------------------------------------


def test_the_cuda_library_builds_and_loads():
    """For sm_80 and sm_90, without a GPU; kept until a source changes."""
    try:
        build.nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "Model.ops.build", "--cuda-check"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "_80_90+PTX.so" in done.stdout


@pytest.fixture
def toolkit(unbuilt, monkeypatch):
    """The folder of compilers that write down their calls; nvcc is behind a script on PATH."""
    answer = f'echo "$0 $*" >> {unbuilt}/calls; while [ "$1" != -o ]; do shift; done; echo x > "$2"'
    version = f'[ "$1" = --version ] && exec cat {unbuilt}/version'
    monkeypatch.setenv("CXX", program(unbuilt / "c++", answer))
    real = program(unbuilt / "toolkit" / "nvcc", f"{version}\n{answer}")
    program(unbuilt / "bin" / "nvcc", f'exec {real} "$@"')
    monkeypatch.setenv("PATH", f"{unbuilt}/bin:/usr/bin:/bin")
    (unbuilt / "version").write_text("Cuda compilation tools, release 13.2, V13.2.1")
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(build, "PYTORCH", unbuilt / "torch")
    monkeypatch.setattr(build, "_visible", list)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    for variable in ("CUDA_HOME", "CUDA_PATH", "NVCC", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    return unbuilt


def test_nothing_of_the_toolkit_but_nvcc_is_needed(toolkit):
    build.library("cuda")
    *compiled, linked = (toolkit / "calls").read_text().splitlines()
    for source in ("kernels.cu", "cuda.cpp"):
        (call,) = [c for c in compiled if f"{source} -o" in c]
        assert call.startswith(f"{toolkit}/toolkit/nvcc -ccbin {toolkit}/c++ ")
        assert "code=[sm_80]" in call
        assert "code=[sm_90,compute_90]" in call
    assert linked.startswith(f"{toolkit}/c++ ")
    assert "-lc10_cuda" in linked
    assert "cudart" not in linked


def test_nvcc_from_pip_is_found_beside_pytorch(toolkit):
    installed = program(toolkit / "nvidia" / "cu13" / "bin" / "nvcc", "echo release 13.2,")
    assert build.nvcc() == installed


def test_an_nvcc_of_another_version_is_refused_with_the_remedy(toolkit):
    (toolkit / "version").write_text("release 12.8, V12.8.1")
    with pytest.raises(build.BuildError, match=r"CUDA 12.8.*toolkit\[nvcc,cccl\]==13\.2\.\*"):
        build.library("cuda")


def test_the_listed_architectures_are_compiled_for(toolkit, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.6;12.0a+PTX")
    assert build.library("cuda").stem.endswith("_75_86_120a+PTX")
    calls = (toolkit / "calls").read_text()
    assert "-gencode=arch=compute_75,code=[sm_75] " in calls
    assert "-gencode=arch=compute_120a,code=[sm_120a,compute_120a] " in calls
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(build.BuildError, match="'Hopper' is no compute capability"):
        build.library("cuda")


def test_a_library_built_without_a_gpu_is_used_where_it_runs(toolkit, monkeypatch):
    built = build.library("cuda")
    for gpu in ((8, 0), (8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(build, "_visible", lambda gpu=gpu: [gpu])
        assert build.library("cuda") == built
    monkeypatch.setattr(build, "_visible", lambda: [(7, 5), (9, 0)])
    assert build.library("cuda").stem.endswith("_75_90")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")  # and what it leaves out
    assert build.library("cuda").stem.endswith("_90_75")


@pytest.mark.parametrize(
    ("architecture", "gpu", "runs"),
    [
        ("80", (8, 6), True), ("86", (8, 0), False), ("80", (9, 0), False), ("90", (10, 0), False),
        ("80+PTX", (12, 1), True), ("90+PTX", (8, 9), False), ("90a", (9, 0), True),
        ("100f", (10, 3), False), ("120", (12, 1), True),
    ],
)  # fmt: skip
def test_which_code_runs_on_which_gpu(architecture, gpu, runs):
    assert build._runs_on(architecture, gpu) == runs


def test_new_flags_or_another_nvcc_behind_the_script_mean_a_new_library(toolkit, monkeypatch):
    built = {build.library("cuda")}
    (toolkit / "version").write_text("release 13.3, V13.3.1")
    built.add(build.library("cuda"))
    monkeypatch.setattr(build, "NVCC_FLAGS", (*build.NVCC_FLAGS, "-lineinfo"))
    built.add(build.library("cuda"))
    assert len(built) == 3


@pytest.mark.parametrize("flags", [[], ["--cuda-check"]])
def test_a_cuda_library_that_can_not_be_built_is_a_failure(toolkit, monkeypatch, capsys, flags):
    assert build.main(flags) == 0
    program(toolkit / "toolkit" / "nvcc", 'case "$1" in --version) echo release 13.1,; exit; esac\n'
                                          "echo error: oh no; exit 1")  # fmt: skip
    assert build.main(flags) == 1
    log = re.search(r"nvcc failed: error: oh no \(all of it: (.*)\)", capsys.readouterr().out)
    assert "oh no" in Path(log[1]).read_text()


def test_a_missing_nvcc_is_a_failure_where_it_is_asked_for(toolkit, monkeypatch):
    monkeypatch.setenv("NVCC", "no-such-compiler")
    assert build.main([]) == int(torch.cuda.is_available())
    assert build.main(["--cuda-check"]) == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build.main([]) == 1


@pytest.mark.parametrize("channels", [1, 15, 16, 39, 64])
def test_bfloat16_is_rounded_to_nearest(channels):
    x = torch.randn(2, channels, 3, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    x[0, 0, 0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, 3e38]).bfloat16()
    gain = torch.rand(2, channels).bfloat16() + 1
    y = apply_epilogue(x, Epilogue(gain=gain, negative_slope=1.0, scale=1.0), "native")
    expected = (x.float() * gain.float()[:, :, None, None]).bfloat16()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
