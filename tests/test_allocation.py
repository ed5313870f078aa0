import itertools
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import prune
from Compression.allocation import ALLOCATIONS, AllocationSettings, Budget, Problem
from Compression.allocation.cheapest import by_resolution, cheapest_first
from Compression.allocation.costs import costs_like
from Compression.allocation.losses import importance_losses, spectrum_losses
from Compression.allocation.shape import uniform
from Compression.scores.sampling import chunks, draw_sampling, readers
from Compression.selection import kept_count
from Model import bundled, checkpoint
from Model.complexity import macs, parameters
from Model.generator import Generator
from tests.helpers import left_half

FULL = (12, 12, 12, 12, 8, 8)


def generator(widths=FULL, size=16):
    torch.manual_seed(0)
    return Generator(size, 8, 2, widths)


@pytest.fixture(scope="module")
def full():
    return generator()


@cache
def costs(full):
    """Costs of generators of these groups."""
    return costs_like(generator(full, 16 if len(full) == 6 else 8))


def budget_of(network, share, **limits):
    """The budget at a share of the way from the least widths to the full ones."""
    counts, sizes = costs(network.channels)
    made = Budget(network.channels, counts, sizes, 0, AllocationSettings(**limits))
    low, high = counts(made.floor), counts(made.full)
    return Budget(made.full, counts, sizes, int(low + share * (high - low)), made.limits)


def widths_of(name, network, budget, **options):
    kind = ALLOCATIONS[name].options
    sampling = draw_sampling(network, parser=left_half, n_sample=4, batch_size=2, noise_prob=1.0)
    sampling = replace(sampling, options=kind(**options) if kind else None)
    scores = [torch.arange(width).float() for width in network.channels]
    return ALLOCATIONS[name].function(Problem(network, scores, sampling, budget))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=6, max_size=6))
def test_costs_are_those_of_a_generator_of_these_widths(widths):
    counts, sizes = costs(FULL)
    made = generator(widths)
    assert (counts(widths), sizes(widths)) == (macs(made), parameters(made))


def test_costs_of_the_published_sizes():
    with torch.device("meta"):
        counts, sizes = costs_like(Generator(256))
        made = Generator(256)
    assert counts(made.channels) == 45_124_673_536
    assert sizes(made.channels) == parameters(made)
    assert counts([154] * 10 + [77, 77, 39, 39]) == 4_123_578_080


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("limits", [{}, {"round_to": 4}, {"min_channels": 2, "round_to": 3}])
def test_no_allocation_exceeds_its_budget(full, name, share, limits):
    budget = budget_of(full, share, **limits)
    widths = widths_of(name, full, budget)
    made = generator(widths)
    assert macs(made) <= budget.most_macs
    for width, most in zip(widths, FULL, strict=True):
        assert budget.limits.min_channels <= width <= most
        assert width == most or width % budget.limits.round_to == 0
    if share == 1:
        assert widths == FULL


@pytest.mark.parametrize("name", ["uniform", "power"])
def test_a_budget_below_the_least_widths_is_refused(full, name):
    with pytest.raises(ValueError, match=r"the least widths .* exceed the budget"):
        widths_of(name, full, budget_of(full, -0.5))


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_parameters_can_be_capped_too(full, name):
    free = widths_of(name, full, budget_of(full, 0.4))
    _, sizes = costs(full.channels)
    least = sizes([4] * 6)
    cap = (sizes(free) + least) // 2
    budget = budget_of(full, 0.4, max_parameters=cap)
    widths = widths_of(name, full, budget)
    assert sizes(widths) <= cap
    assert macs(generator(widths)) <= budget.most_macs


@pytest.mark.parametrize("ratio", [0.3, 0.55, 0.7, 0.9])
def test_uniform_at_a_ratios_cost_is_that_ratio(ratio):
    for full in ((512, 512, 256, 256, 128, 128), (20, 20, 20, 20, 10, 10)):
        kept = [kept_count(width, ratio) for width in full]
        counts, sizes = costs(FULL)  # of any 16 px generator of this style_dim
        budget = Budget(full, counts, sizes, counts(kept), AllocationSettings(min_channels=1))
        assert list(uniform(Problem(None, (), None, budget))) == kept


def test_power_falls_with_resolution():
    network = generator((64,) * 6)
    budget = budget_of(network, 0.1)
    widths = widths_of("power", network, budget, power_exponent=1.0)
    assert widths[::2] == widths[1::2]
    assert [widths[0] / w for w in widths[::2]] == pytest.approx([1, 2, 4], rel=0.1)
    assert widths_of("power", network, budget, power_exponent=0.0) == widths_of(
        "uniform", network, budget
    )


def test_cheapest_first_finds_the_best_widths_where_they_can_be_enumerated():
    # Convex losses; no other widths within the budget lose less than by one step of the greedy.
    network = generator((6, 6, 6, 6), size=8)
    losses = [1.0 / torch.arange(1, 8).double() * scale for scale in (1, 2, 3, 4)]
    budget = budget_of(network, 0.4, min_channels=1)

    def loss(widths):
        return sum(curve[w].item() for curve, w in zip(losses, widths, strict=True))

    found = cheapest_first(budget, losses)
    tied = cheapest_first(budget, losses, by_resolution(network.channels))
    every = [w for w in itertools.product(range(1, 7), repeat=4) if budget.fits(w)]
    assert loss(found) <= 1.1 * min(map(loss, every))
    assert tied[::2] == tied[1::2]
    same = [w for w in every if w[::2] == w[1::2]]
    assert loss(tied) <= 1.1 * min(map(loss, same))


def test_only_equally_wide_layers_of_a_resolution_are_tied():
    assert by_resolution((8, 8, 6, 4)) == [(0, 1), (2,), (3,)]


def test_importance_is_the_magnitude_of_weight_times_gradient(full):
    sampling = draw_sampling(full, parser=left_half, n_sample=2, batch_size=2, noise_prob=1.0)
    ((z, noise, _),) = chunks(full, sampling)
    weights = [layer.conv.weight for layer in readers(full)]
    images = full([z], noise=noise)
    stream = sampling.stream(2)
    draw = torch.rand(2, 1, 16, 16, generator=stream)
    noisy = torch.where(left_half(images) > 0, torch.where(draw < 0.5, -1.0, 1.0), images.detach())
    (noisy - images).abs().sum().backward()
    for curve, weight in zip(importance_losses(full, sampling), weights, strict=True):
        each = (weight * weight.grad).double().abs().sum(dim=(0, 1, 3, 4)).sort().values
        for left in range(len(each) + 1):
            lost = each[: len(each) - left].sum().item()
            assert curve[left].item() == pytest.approx(lost, rel=1e-4, abs=1e-9)
        weight.grad = None


def test_spectrum_is_the_error_of_the_best_linear_reconstruction(full):
    sampling = draw_sampling(full, parser=left_half, n_sample=3, batch_size=3)
    ((z, noise, _),) = chunks(full, sampling)
    with torch.no_grad():
        w = full.mapping(z)
        made = full.synthesis(full.w_plus([z]), noise, features=True)
        curves = spectrum_losses(full, sampling)
    reader = readers(full)[3]
    x = (made.features[2] * reader.conv.style(w)[:, :, None, None]).double()  # 8 px, 12 channels
    weight = (0.1 + 0.9 * left_half(x)).double().flatten()
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    rows = (rows - (rows * weight[: len(rows), None]).sum(0) / weight.sum()) * weight[
        :, None
    ].sqrt()
    total = rows.square().sum()
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    for left in (0, 1, 5, 12):
        best = (u[:, :left] * s[:left]) @ v[:left]
        error = ((rows - best).square().sum() / total).item()
        assert curves[3][left].item() == pytest.approx(error, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["greedy", "spectrum"])
def test_rounds_and_untied_layers(full, name):
    budget = budget_of(full, 0.2)
    for options in ({"allocation_rounds": 3}, {"allocation_tie": False}):
        widths = widths_of(name, full, budget, **options)
        assert budget.fits(widths)
        if "allocation_tie" not in options:
            assert widths[::2] == widths[1::2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allocation")
    checkpoint.save(folder / "full.pt", {"g_ema": generator()})
    return folder


def run(folder, *flags):
    files = ["--ckpt", folder / "full.pt", "--parser_ckpt", bundled.PARSER]
    how = "--n_sample 2 --batch_size 2 --noise_prob 1 --device cpu --metric l1_out"
    return prune.main([*map(str, files), *how.split(), *map(str, flags)])


def test_prunes_to_a_budget_and_remembers_it(folder, capsys):
    out, most = folder / "p.pt", budget_of(generator(), 0.3).most_macs
    assert run(folder, "--macs", most, "--round_to", 2, "--out", out, "--info_print") == 0
    pruned = checkpoint.load_generator(out)
    assert macs(pruned) <= most
    assert all(width % 2 == 0 for width in pruned.channels)
    config = checkpoint.read(out)["config"]
    assert (config["macs"], config["remove_ratio"], config["round_to"]) == (most, None, 2)
    assert config["channels_after"] == list(pruned.channels)
    assert config["allocation"] in ALLOCATIONS
    printed = capsys.readouterr().out
    assert f"{macs(pruned):,}" in printed
    assert f"{parameters(pruned):,}" in printed
    rule = f"greedy, at most {most:,} multiply-accumulates, multiples of 2, at least 4 channels a"
    assert f"widths: {rule} layer" in printed


def test_smaller_filters_are_counted_kept_and_remembered(folder, capsys):
    out, full = folder / "heter.pt", generator()
    flags = ["--remove_ratio", 0.5, "--allocation", "power", "--second_kernel", 1]
    assert run(folder, *flags, "--out", out) == 0
    pruned = checkpoint.load_generator(out)
    assert pruned.second_kernel == checkpoint.read(out)["config"]["second_kernel"] == 1
    counted, parameters_counted = costs_like(full, 1)
    assert counted(pruned.channels) == macs(pruned)
    assert parameters_counted(pruned.channels) == parameters(pruned)
    assert macs(pruned) <= counted([width - width // 2 for width in full.channels])
    kept = pruned.convs[1].conv.weight.flatten().detach()
    assert torch.isin(kept, full.convs[1].conv.weight[..., 1, 1].detach()).all()
    pruned([torch.randn(2, pruned.style_dim)]).square().mean().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    assert run_code(folder, ["--ckpt", str(out), "--second_kernel", "3"]) == 2
    assert "--second_kernel" in (error := capsys.readouterr().err)
    assert "cannot grow" in error


def test_another_allocation_costs_at_most_what_the_ratio_leaves(folder):
    costs = []
    for flags in ((), ("--allocation", "power")):
        assert run(folder, "--remove_ratio", 0.5, *flags, "--out", folder / "p.pt") == 0
        costs.append(macs(checkpoint.load_generator(folder / "p.pt")))
    assert costs[1] <= costs[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--macs 1e5 --remove_ratio 0.5", "leave one out"),
        ("--macs 10", "--macs means 10 multiply-accumulates, out of reach: there are"),
        ("--macs 1e12", "(the full model)"),
        ("--macs 1e5 --max_parameters 3", "--max_parameters means 3 parameters, out of reach"),
        ("--remove_ratio 0.95 --allocation power", "--remove_ratio means"),
        ("--round_to 4", "--round_to goes with macs"),
        ("--macs 1e5 --allocation best", "unknown; take"),
    ],
)
def test_refuses_what_cannot_be_reached(folder, capsys, flags, words):
    assert run_code(folder, flags.split()) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error


def run_code(folder, flags):
    try:
        return run(folder, *flags, "--out", folder / "never.pt")
    except SystemExit as error:
        return error.code
