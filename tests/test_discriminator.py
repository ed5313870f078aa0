import pytest
import torch

from Compression.losses import d_logistic_loss, g_nonsaturating_loss, r1_penalty
from Model.discriminator import Discriminator, minibatch_stddev
from Model.layers import EqualConv2d
from tests.golden_fill import assert_golden, fill_from_numpy, load_golden
from Util import distributed


def test_logits_and_losses_equal_the_original():
    arrays, spec = load_golden("discriminator_32px")
    network = Discriminator(spec["size"], spec["channel_multiplier"])
    fill_from_numpy(network, spec["seed"])
    real = torch.as_tensor(arrays["real"]).requires_grad_()
    real_logits, fake_logits = network(real), network(torch.as_tensor(arrays["fake"]))
    assert_golden(real_logits, arrays, "real_logits")
    assert_golden(fake_logits, arrays, "fake_logits")
    assert_golden(d_logistic_loss(real_logits, fake_logits), arrays, "d_loss")
    assert_golden(g_nonsaturating_loss(fake_logits), arrays, "g_loss")
    penalty = r1_penalty(real_logits, real)
    assert_golden(penalty, arrays, "r1")
    (grad,) = torch.autograd.grad(penalty, network.convs[0][0].weight)
    assert_golden(grad, arrays, "r1_grad_first_conv")


def test_minibatch_stddev_is_zero_for_equal_images_and_grows_with_variety():
    same = torch.randn(1, 3, 4, 4).expand(4, -1, -1, -1)
    assert minibatch_stddev(same)[:, -1].max() < 1e-3
    spread = torch.tensor([-1.0, 1.0, -1.0, 1.0]).view(4, 1, 1, 1).expand(4, 3, 4, 4)
    torch.testing.assert_close(minibatch_stddev(spread)[:, -1], torch.ones(4, 4, 4))


def test_any_batch_size_works():
    network = Discriminator(8, channels=(4, 4))
    for n in (1, 3, 5, 6):
        assert network(torch.randn(n, 3, 8, 8)).shape == (n, 1)


@pytest.mark.parametrize(("own", "world"), [(1, 4), (2, 2), (2, 4), (3, 2), (8, 2)])
def test_groups_are_those_of_the_batch_of_all_processes(own, world, monkeypatch):
    torch.manual_seed(0)
    whole = torch.randn(own * world, 3, 4, 4)
    expected = minibatch_stddev(whole)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    for rank in range(world):
        shares = [whole[k::world] for k in range(world)]
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "gather_rows", lambda x, shares=shares: torch.cat(shares))
        found = minibatch_stddev(shares[rank], over_processes=True)
        torch.testing.assert_close(found, expected[rank::world])


@pytest.mark.parametrize(("own", "world"), [(4, 1), (2, 2), (3, 2)])
def test_only_images_of_one_batch_are_compared(own, world, monkeypatch):
    torch.manual_seed(0)
    batches = torch.randn(2, own * world, 3, 4, 4)
    expected = torch.stack([minibatch_stddev(batch) for batch in batches])
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    shares = [batches[:, k::world].flatten(0, 1) for k in range(world)]
    monkeypatch.setattr(distributed, "gather_rows", lambda x: torch.cat(shares))
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found = minibatch_stddev(shares[rank], over_processes=True, batches=2)
        torch.testing.assert_close(found, expected[:, rank::world].flatten(0, 1))


def test_in_several_processes_gradients_are_whole_block_by_block(monkeypatch):
    torch.manual_seed(0)
    network, images = Discriminator(16, channels=(4, 3, 3)), torch.randn(2, 3, 16, 16)
    expected = torch.autograd.grad(network(images).sum(), list(network.parameters()))
    order = []
    for name, parameter in network.named_parameters():
        if parameter.ndim == 4:
            parameter.register_hook(lambda grad, name=name: order.append(name))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    found = torch.autograd.grad(network(images).sum(), list(network.parameters()))
    torch.testing.assert_close(found, expected)
    blocks = [".".join(name.split(".")[:2]) for name in order]
    assert blocks == sorted(blocks, reverse=True), order


def test_the_weights_of_all_layers_are_scaled_at_once_with_their_derivatives():
    torch.manual_seed(0)
    network = Discriminator(8, channels=(4, 3)).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    layers = [layer for layer in network.modules() if isinstance(layer, EqualConv2d)]
    penalty = r1_penalty(network(images), images)
    found = torch.autograd.grad(penalty, [layer.weight for layer in layers])
    x = images
    for block in network.convs:  # each layer scales its own
        x = block(x)
    x = network.final_conv(minibatch_stddev(x)).flatten(1)
    penalty = r1_penalty(network.final_linear(x), images)
    expected = torch.autograd.grad(penalty, [layer.weight for layer in layers])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
