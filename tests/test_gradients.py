import pytest
import torch
from torch import nn

from Util import gradients
from Util.gradients import Gradients


class Network(nn.Module):
    """Three layers, the second of which a loss need not reach."""

    def __init__(self):
        super().__init__()
        self.first, self.unused, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.last(self.first(x).tanh())


@pytest.fixture
def sent(monkeypatch):
    """A second process whose gradients are all 1; notes the transfers and when they happen."""
    events = []

    class Work:
        def wait(self):
            events.append("wait")

    def all_reduce(flat, async_op):
        assert async_op
        events.append(flat.numel())
        flat += 1
        return Work()

    monkeypatch.setattr(gradients, "world_size", lambda: 2)
    monkeypatch.setattr(gradients.distributed, "all_reduce", all_reduce)
    return events


def expected(network, x):
    loss = network(x).square().mean()
    grads = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    pairs = zip(network.parameters(), grads, strict=True)
    return [torch.zeros_like(p) if g is None else g for p, g in pairs]


def test_buckets_leave_while_backward_runs_and_always_in_the_same_order(sent):
    network, x = Network(), torch.randn(3, 4)
    own = list(network.parameters())
    wanted = expected(network, x)
    network.first.weight.register_hook(lambda grad: sent.append("first layer"))
    one = Gradients(own, own[4:] + own[:2] + own[2:4], bucket_bytes=80)
    for _ in range(2):
        sent.clear()
        one.start()
        loss = network(x).square().mean()
        one.backward(loss, loss.detach())
        during = list(sent)
        found, extra = one.finish()
        # 4 * 4 + 4 values a layer, and each bucket's scalar.
        assert during == [21, "first layer", 21]
        assert sent == [*during, 21, "wait", "wait", "wait"]
        for grad, own_grad in zip(found, wanted, strict=True):
            torch.testing.assert_close(grad, (own_grad + 1) / 2)
        torch.testing.assert_close(extra, (loss.detach() + 1) / 2)
        assert {p.grad.untyped_storage().data_ptr() for p in own} == {
            own[0].grad.untyped_storage().data_ptr()
        }


def test_a_missing_gradient_holds_up_the_buckets_behind_it_until_the_end(sent):
    network, x = Network(), torch.randn(3, 4)
    one = Gradients(network.parameters(), reversed(list(network.parameters())), bucket_bytes=80)
    one.start()
    loss = network(x).square().mean()
    one.backward(loss, loss.detach())
    assert sent == [21]
    one.finish()
    assert sent == [21, 21, 21, "wait", "wait", "wait"]


def test_gradients_of_parts_add_up_before_they_leave(sent):
    network, x = Network(), torch.randn(2, 3, 4)
    wanted = [sum(pair) for pair in zip(*(expected(network, part) for part in x), strict=True)]
    one = Gradients(network.parameters(), bucket_bytes=10**6)
    one.start()
    for i, part in enumerate(x):
        loss = network(part).square().mean()
        one.backward(loss, loss.detach() if i == 1 else None)
        assert sent == []
    found, _ = one.finish()
    for grad, own_grad in zip(found, wanted, strict=True):
        torch.testing.assert_close(grad, (own_grad + 1) / 2)


def test_one_process_sends_nothing_and_fills_what_is_missing():
    network, x = Network(), torch.randn(3, 4)
    network.first.bias.requires_grad_(False)
    one = Gradients(network.parameters())
    one.start()
    loss = network(x).square().mean()
    one.backward(loss, loss.detach())
    found, extra = one.finish()
    assert len(found) == 5
    assert not network.unused.weight.grad.any()
    assert network.first.bias.grad is None
    assert extra == loss


def test_gradients_lie_as_their_parameters_do():
    weight, factors = nn.Parameter(torch.randn(3, 2)), torch.randn(2, 3)
    one = Gradients([weight])
    one.start()
    loss = (weight.t() * factors).sum()  # whose gradient is a transposed tensor
    one.backward(loss, loss.detach())
    (found,), _ = one.finish()
    assert found.stride() == weight.stride()
    torch.testing.assert_close(found, factors.t(), rtol=0, atol=0)
