import torch

from Compression.scores import channel_scores
from Compression.scores.covariance import greedy_order, input_covariances
from Compression.scores.sampling import chunks, draw_sampling, readers
from Model.generator import Generator
from tests.helpers import left_half


def error_of(rows, chosen):
    """Squared error of all columns regressed on the chosen ones."""
    basis = rows[:, chosen]
    return (rows - basis @ torch.linalg.lstsq(basis, rows).solution).square().sum().item()


def test_each_channel_is_the_one_that_leaves_least_to_reconstruct():
    torch.manual_seed(0)
    rows = torch.randn(60, 3).double() @ torch.randn(3, 7).double()
    rows = rows + 0.3 * torch.randn(60, 7).double()
    found = greedy_order(rows.T @ rows)
    assert sorted(found) == list(range(7))
    for step in range(6):
        rest = [j for j in range(7) if j not in found[:step]]
        errors = {j: error_of(rows, [*found[:step], j]) for j in rest}
        assert found[step] == min(errors, key=errors.get)


def test_copies_and_dead_channels_come_last():
    torch.manual_seed(0)
    rows = torch.randn(50, 3).double()
    # 0, 1, 2; a copy of 1; nothing; a sum of 0 and 2.
    rows = torch.cat([rows, rows[:, 1:2], 0 * rows[:, :1], rows[:, :1] + rows[:, 2:]], dim=1)
    order = greedy_order(rows.T @ rows)
    first = order[:3]
    assert error_of(rows, first) < 1e-9
    assert 4 not in first


def test_covariance_is_that_of_the_modulated_inputs_inside_the_content():
    torch.manual_seed(0)
    full = Generator(16, 8, 2, (5, 5, 6, 6, 4, 4))
    sampling = draw_sampling(full, parser=left_half, n_sample=3, batch_size=2)
    found = input_covariances(full, sampling)
    total, weight, values = 0.0, [], []
    with torch.no_grad():
        for z, noise, _ in chunks(full, sampling):
            x = full.synthesis(full.w_plus([z]), noise, features=True).features[1]
            x = x * readers(full)[2].conv.style(full.mapping(z))[:, :, None, None]
            values.append(x.permute(0, 2, 3, 1).flatten(0, 2).double())
            weight.append((0.1 + 0.9 * left_half(x)).double().flatten())
    values, weight = torch.cat(values), torch.cat(weight)
    mean = sum(m * v for m, v in zip(weight, values, strict=True)) / weight.sum()
    for m, v in zip(weight, values, strict=True):
        total = total + m * torch.outer(v - mean, v - mean)
    torch.testing.assert_close(found[2], total / weight.sum(), rtol=1e-4, atol=1e-8)
    scores = channel_scores(full, "subset", parser=left_half, n_sample=3, batch_size=2)
    assert scores[2].argsort(descending=True).tolist() == greedy_order(found[2])
