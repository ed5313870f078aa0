import math

import numpy as np
import pytest
import torch

from Evaluation import sampling
from Evaluation.directions import components_of, modulation_directions, principal_components, walk
from Evaluation.walking import find_walks, walking_distances
from Model.generator import Generator


def small(size=32, style_dim=12):
    torch.manual_seed(1)
    return Generator(size, style_dim, 2, [9] * (2 * int(math.log2(size)) - 2))


def test_components_are_the_axes_of_the_variance():
    scale = torch.tensor([5.0, 0.1, 3.0, 1.0])
    rotation, _ = torch.linalg.qr(torch.randn(4, 4))
    found = components_of(torch.randn(20000, 4) * scale @ rotation + 7)
    agreement = torch.cosine_similarity(found.components[:2], rotation[[0, 2]]).abs()
    torch.testing.assert_close(agreement, torch.ones(2), rtol=0, atol=1e-3)
    torch.testing.assert_close(found.deviations[:2], torch.tensor([5.0, 3.0]), rtol=0.03, atol=0)
    torch.testing.assert_close(found.shares[:2], torch.tensor([25, 9]) / 35.01, rtol=0.05, atol=0)


def test_principal_components_are_those_of_w():
    generator = small()
    found = principal_components(generator, seed=3, n=500)
    torch.testing.assert_close(
        found.components @ found.components.T, torch.eye(12), rtol=0, atol=1e-5
    )
    assert (found.deviations.diff() <= 0).all()
    torch.testing.assert_close(found.shares.sum(), torch.tensor(1.0))
    # An independent sample has the same spread along them, up to chance.
    with torch.no_grad():
        w = generator.mapping(torch.randn(20_000, 12))
    along = ((w - w.mean(0)) @ found.components.T).std(dim=0)
    torch.testing.assert_close(along, found.deviations, rtol=0.15, atol=1e-3)
    correlations = np.corrcoef(((w - w.mean(0)) @ found.components[:3].T).T.numpy())
    assert np.abs(correlations - np.eye(3)).max() < 0.15


def test_components_depend_on_the_seed_alone():
    generator = small()
    first = principal_components(generator, 0, 50)
    torch.rand(5)
    again = principal_components(generator, 0, 50)
    torch.testing.assert_close(first.components, again.components, rtol=0, atol=0)
    assert not torch.equal(first.components, principal_components(generator, 1, 50).components)


def test_modulation_directions_by_their_definition():
    generator = small()
    found = modulation_directions(generator, blocks=2, each=3).double().numpy()
    assert found.shape == (6, 12)
    for block in range(2):
        columns = []
        for layer in (2 * block, 2 * block + 1):
            for row in generator.convs[layer].conv.modulation.weight.detach().double().numpy():
                columns.append(row / np.sqrt((row**2).sum()))
        a = np.stack(columns, axis=1)
        values, vectors = np.linalg.eig(a @ a.T)
        order = np.argsort(values)[::-1]
        for rank in range(3):
            expected = vectors[:, order[rank]]
            assert abs(expected @ found[3 * block + rank]) > 1 - 1e-6


def test_number_of_directions_follows_the_layers():
    assert len(modulation_directions(small(8))) == 5
    assert len(modulation_directions(small(128))) == 25
    assert len(modulation_directions(small(256))) == 25


def test_walk_moves_the_rows_that_are_named():
    w_plus = torch.randn(2, 4, 3)
    direction = torch.tensor([0.0, 1.0, 0.0])
    whole = walk(w_plus, direction, 2.5)
    torch.testing.assert_close(whole[..., 1], w_plus[..., 1] + 2.5)
    torch.testing.assert_close(whole[..., [0, 2]], w_plus[..., [0, 2]])
    part = walk(w_plus, direction, -1.0, [1, 3])
    torch.testing.assert_close(part[:, [0, 2]], w_plus[:, [0, 2]])
    torch.testing.assert_close(part[:, [1, 3], 1], w_plus[:, [1, 3], 1] - 1)


@pytest.mark.parametrize("kind", ["principal", "modulation"])
def test_walks_go_in_deviations_of_w(kind):
    generator = small()
    (second, last) = find_walks(generator, kind, [1, 4], [0, 2], seed=3)
    with torch.no_grad():
        w = generator.mapping(torch.randn(20_000, 12))
        latents = sampling.from_z(generator, torch.randn(2, 12))
    for found, number in ((second, 1), (last, 4)):
        along = (w - w.mean(0)) @ found.direction
        assert found.deviation == pytest.approx(along.std().item(), rel=0.1)
        share = along.var() / w.var(dim=0).sum()
        name, text = found.name.splitlines()
        assert name.endswith(f" {number}")
        assert float(text.split()[0]) == pytest.approx(100 * share.item(), rel=0.15)
    moved = second.to(latents, -2.0).w_plus - latents.w_plus
    expected = -2 * second.deviation * second.direction
    torch.testing.assert_close(moved[:, [0, 2]], expected.expand(2, 2, -1))
    assert not moved[:, [1, 3, 4, 5]].any()


def test_numbers_of_directions_that_there_are_not():
    with pytest.raises(ValueError, match="12: principal directions have the numbers 0 to 11"):
        find_walks(small(), "principal", [0, 12], [0], seed=0)
    with pytest.raises(ValueError, match="-1: modulation directions have the numbers 0 to 14"):
        find_walks(small(), "modulation", [-1], [0], seed=0)


def test_walking_distances_by_hand():
    def constant(a, b):
        return torch.tensor([a, b]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    frames = [constant(*pair) for pair in ((0.0, 1.0), (0.1, 1.0), (0.4, 3.0))]
    found = walking_distances(
        constant(0.2, 1.0), frames, lambda a, b: (a - b).abs().mean(dim=(1, 2, 3))
    )
    assert found == pytest.approx(
        {
            "to_ends": (0.2 + 0.0 + 0.2 + 2.0) / 4,
            "step": (0.1 + 0.0 + 0.3 + 2.0) / 4,
            "largest_step": (0.3 + 2.0) / 2,
        }
    )
