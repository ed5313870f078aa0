"""The distance of LPIPS: the compiled operator and the one on lists, against its equation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from Model.ops import dispatch, feature_distance

if (reason := dispatch.why_not("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

IMPLS = ("native", "reference")


def equation(a, b, weights):
    """Sum over layers of the mean over positions of sum_c w_c (u_c - v_c)^2, step by step."""
    found = 0
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        u, v = (z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (x, y))
        w = weights[i] if weights else 1
        found = found + (w * (u - v).square()).sum(1).mean((1, 2))
    return found


def maps(n, sizes, dtype=torch.float64, last=False):
    """Positive features of layers with the given channels, heights and widths."""
    made = [torch.rand(n, *size, dtype=dtype) for size in sizes]
    return [x.contiguous(memory_format=torch.channels_last) if last else x for x in made]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)), min_size=1),
    st.booleans(),
    st.booleans(),
    st.sampled_from(IMPLS),
    st.sampled_from([(True, False), (False, True), (True, True)]),
)
def test_value_and_gradients_are_those_of_the_equation(n, sizes, last, weighted, impl, wanted):
    sides = [maps(n, sizes, last=last) for _ in range(2)]
    weights = [torch.rand(1, c, 1, 1, dtype=torch.float64) for c, _, _ in sizes]
    for wants, side in zip(wanted, sides, strict=True):
        for x in side:
            x.requires_grad_(wants)
    leaves = [x for side in sides for x in side if x.requires_grad]
    factors = torch.rand(n, dtype=torch.float64)
    expected = equation(*sides, weights if weighted else None)
    found = feature_distance(*sides, weights if weighted else None, impl=impl)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad((found * factors).sum(), leaves),
        torch.autograd.grad((expected * factors).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_equal_features_have_no_distance_and_small_ones_are_exact(impl):
    a = maps(2, [(64, 16, 16)], torch.float32)
    assert (feature_distance(a, a, impl=impl) == 0).all()
    # As in the path length: a ten-thousandth apart. 1e-4 of it is asked for.
    b = [x + 1e-4 * torch.randn_like(x) for x in a]
    exact = equation([x.double() for x in a], [x.double() for x in b], None)
    found = feature_distance(a, b, impl=impl).double()
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_features_of_zero_have_finite_gradients(impl):
    a, b = maps(1, [(8, 2, 2)], torch.float32), maps(1, [(8, 2, 2)], torch.float32)
    a[0][:, :, 0] = b[0][:, :, 0] = 0
    a[0].requires_grad_()
    feature_distance(a, b, impl=impl).sum().backward()
    assert a[0].grad.isfinite().all()
    assert (a[0].grad[:, :, 0] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_side_may_have_gradients_in_some_layers_alone(impl):
    a, b = (maps(2, [(4, 3, 3), (5, 2, 2)]) for _ in range(2))
    a[1].requires_grad_()
    found = feature_distance(a, b, impl=impl).sum()
    (grad,) = torch.autograd.grad(found, a[1])
    (expected,) = torch.autograd.grad(equation(a, b, None).sum(), a[1])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (2, 4, 3, 2), (0, 4, 3, 3)])
def test_other_shapes_are_refused(impl, shape):
    with pytest.raises(ValueError, match="feature_distance: maps of"):
        feature_distance([torch.rand(2, 4, 3, 3)], [torch.rand(shape)], impl=impl)


def test_does_not_depend_on_the_number_of_threads():
    a, b = maps(2, [(16, 64, 64)], torch.float32), maps(2, [(16, 64, 64)], torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            side = [x.clone().requires_grad_() for x in a]
            found = feature_distance(side, b, impl="native")
            results.append([found, *torch.autograd.grad(found.sum(), side)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_is_differentiable_once_and_says_so():
    a, b = maps(1, [(4, 3, 3)]), maps(1, [(4, 3, 3)])
    a[0].requires_grad_()
    for impl in IMPLS:
        found = feature_distance(a, b, impl=impl).square().sum()
        (grad,) = torch.autograd.grad(found, a, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_refuses_maps_that_do_not_fit():
    x = torch.rand(1, 4, 3, 3)
    for other in (torch.rand(1, 4, 3, 2), x.double(), x[0]):
        with pytest.raises(RuntimeError, match=r"feature_distance: expected two \(N, C, H, W\)"):
            torch.ops.stylegan.feature_distance(x, other, None, 1e-10)
    with pytest.raises(RuntimeError, match="weight must have 1 \\* 4 elements"):
        torch.ops.stylegan.feature_distance(x, x, torch.rand(3), 1e-10)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_shapes_for_tracing_are_those_of_the_operator(wanted):
    a, b = (maps(2, [(4, 3, 5)], last=True)[0] for _ in range(2))
    weight, grad = torch.rand(1, 4, 1, 1).double(), torch.rand(2).double()
    operators = torch.ops.stylegan
    torch.library.opcheck(operators.feature_distance.default, (a, b, weight, 1e-10))
    arguments = (grad, a, b, weight, 1e-10, *wanted)
    torch.library.opcheck(operators.feature_distance_backward.default, arguments)
