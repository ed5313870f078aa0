"""Least squares for one layer of a pruned generator.

A styled convolution computes for picture n, position p and output channel o, with the leaky ReLU f,

    a = f(y + noise + b_o),     y = d_o(n) X u_o,     d_o(n) = 1 / |s(n) u_o|

X holds the k x k neighbourhoods of the modulated inputs and u_o the filter, in columns of unit root
mean square style. Demodulation divides the filter's length out, so the fit has |u_o| = 1, and
that is all the ridge it needs. With the full generator's t for y, and weights m of the positions:

    closed form:  min over u_o of       sum m (t / d_o - X u_o)^2
                  u_o = (X'mX + lambda_o)^-1 X'm t / d_o,  lambda_o so that |u_o| = 1
    refinement:   min over u_o, b_o of  sum m (f(t + noise + b) - f(y + noise + b_o))^2

The closed form holds d_o at its last value and is solved three times. The refinement takes
conjugate gradient steps with (X'mX + lambda_o)^-1 as preconditioner; every filter's step is as long
as lowers its own error most, or nothing. Noise strengths and styles stay as they are.

A ToRGB is not demodulated: one least squares on what is missing of the full generator's RGB sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from Compression.scores.positions import Positions
from Model.layers import ModulatedConv2d, StyledConv, ToRGB
from Model.ops import Epilogue, upfirdn2d

SLOPE, GAIN = Epilogue().negative_slope, Epilogue().scale
HELD_SOLUTIONS = 3
STEP_LENGTHS = (1.0, 0.5, 0.2, 2.0)
"""Tried in this order, in units of the minimum of the linearised error."""
ROWS_AT_ONCE = 2**14


def pre_activation(activation: Tensor) -> Tensor:
    """What `fused_leaky_relu` made an activation of, bias included."""
    scaled = activation / GAIN
    return torch.where(scaled < 0, scaled / SLOPE, scaled)


def _leaky(y: Tensor) -> Tensor:
    return F.leaky_relu(y, SLOPE)


def neighbourhoods(conv: ModulatedConv2d, x: Tensor, style: Tensor, at: Positions) -> Tensor:
    """The inputs of a modulated k x k convolution at positions of its output.

    An upsampling convolution, transposed and then blurred, is an ordinary one of the blurred
    enlarged map with its kernel turned round.

    Args:
        conv: tells whether it upsamples.
        x: (n, I, h, w).
        style: (n, I) scales of the inputs.
        at: P positions of each picture.

    Returns:
        (n * P, k * k * I), in the order of `filters`.
    """
    x = x * style[:, :, None, None]
    k = conv.weight.shape[-1]
    if conv.upsample:
        x = upfirdn2d(x, conv.blur.kernel, up=2, pad=(3, 2))
    else:
        x = F.pad(x, (k // 2,) * 4)
    n, channels, side, _ = x.shape
    row, column = at.index // at.side, at.index % at.side
    first = torch.arange(n, device=x.device)[:, None] * side**2 + row * side + column
    tap = torch.arange(k, device=x.device)
    index = first[..., None] + (tap[:, None] * side + tap).flatten()
    flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
    return flat[index.flatten()].view(at.index.numel(), k * k * channels)


def filters(conv: ModulatedConv2d) -> Tensor:
    """Weights (1, O, I, k, k) as (O, k * k * I), as `neighbourhoods` lays out the inputs."""
    weight = conv.weight[0].flip((2, 3)) if conv.upsample else conv.weight[0]
    return weight.permute(0, 2, 3, 1).flatten(1)


def _set_filters(conv: ModulatedConv2d, found: Tensor) -> None:
    """Store filters (O, k * k * I), each as long as the one that it replaces."""
    old = filters(conv)
    length = old.norm(dim=1, keepdim=True)
    found = _unit(found) * torch.where(length > 0, length, 1)
    weight = found.unflatten(1, (*conv.weight.shape[3:], -1)).permute(0, 3, 1, 2)
    conv.weight.copy_((weight.flip((2, 3)) if conv.upsample else weight)[None])


def _unit(filters: Tensor) -> Tensor:
    """Filters of length 1; one that is zero points nowhere, and reads all inputs alike instead."""
    zero = (filters == 0).all(dim=1, keepdim=True)
    return F.normalize(torch.where(zero, 1.0, filters), dim=1)


class LayerFit:
    """The fit of one styled convolution; see the module for the equations.

    Args:
        rows: (n * P, T * I) for T taps, X divided by the root mean square styles.
        target: (n, P, O) pre-activations t + noise + b of the full generator.
        noise: (n, P, 1), times its strength.
        weight: (n, P), m; scaled to the sum 1.
        power: (n, I) squared styles divided by their mean over n.
        start: (O, T * I) kept filters times the root mean square styles.
        bias: (O,).
        ridge: least lambda in units of the mean eigenvalue of X'mX.
    """

    def __init__(
        self,
        rows: Tensor,
        target: Tensor,
        noise: Tensor,
        weight: Tensor,
        power: Tensor,
        start: Tensor,
        bias: Tensor,
        ridge: float,
    ) -> None:
        self.rows, self.noise, self.power = rows, noise, power
        self.taps = rows.shape[1] // power.shape[1]
        self.weight = (weight / weight.sum())[..., None]
        self.target, self.activation = target, _leaky(target)
        mean = (self.activation * self.weight).sum(dim=(0, 1))
        self.variance = ((self.activation - mean).square() * self.weight).sum(dim=(0, 1))
        self.values, self.vectors = torch.linalg.eigh(self._moments())
        self.values = self.values.clamp(min=0)
        self.least = max(ridge * self.values.mean().item(), 1e-30)
        self.ridge = self.values.new_full((len(bias),), self.least)
        self.bias = bias.clone()
        self._move_to(_unit(start))
        self.error = self._error(self.y, self.bias)

    def _moments(self) -> Tensor:
        """X'mX in double precision."""
        parts = zip(
            self.rows.split(ROWS_AT_ONCE), self.weight.view(-1, 1).split(ROWS_AT_ONCE), strict=True
        )
        return sum((part.T @ (part * m)).double() for part, m in parts)

    def _demodulation(self, filters: Tensor) -> Tensor:
        """d, (n, 1, O)."""
        per_input = filters.view(len(filters), self.taps, -1).square().sum(dim=1)
        return torch.rsqrt(F.linear(self.power, per_input))[:, None]

    def _move_to(self, filters: Tensor) -> None:
        self.filters, self.gain = filters, self._demodulation(filters)
        self.raw = self._apply(filters)
        self.y = self.raw * self.gain

    def _apply(self, filters: Tensor) -> Tensor:
        """X u, (n, P, O)."""
        return (self.rows @ filters.T).view((*self.target.shape[:2], -1))

    def _transposed(self, values: Tensor) -> Tensor:
        """X' of (n, P, O), (T * I, O)."""
        return self.rows.T @ values.flatten(0, 1)

    def _error(self, y: Tensor, bias: Tensor) -> Tensor:
        """Weighted squared error of the activations of every channel, (O,)."""
        difference = self.activation - _leaky(y + self.noise + bias)
        return (difference.square_() * self.weight).sum(dim=(0, 1))

    @property
    def r2(self) -> float:
        """Share of the activations' variance that is explained; may be negative."""
        return 1 - (self.error.sum() / self.variance.sum().clamp(min=1e-30)).item()

    def solve(self) -> None:
        """The closed form; filters whose activations it does not bring nearer stay."""
        start, y, bias = self.filters, self.target - self.noise - self.bias, self.bias
        for _ in range(HELD_SOLUTIONS):
            goal = self._transposed(y / self.gain * self.weight)
            self.filters = _unit(self._constrained(goal))
            self.gain = self._demodulation(self.filters)
        self._move_to(self.filters)
        worse = self._error(self.y, bias) >= self.error
        self._move_to(torch.where(worse[:, None], start, self.filters))
        self.error = self._error(self.y, bias)

    def _constrained(self, goal: Tensor) -> Tensor:
        """(X'mX + lambda)^-1 goal, (O, T * I), by bisection for the lambda that gives length 1.

        Where no lambda of at least the least does, the least is taken.
        """
        projected = self.vectors.T @ goal.double()
        low = torch.full_like(self.ridge, self.least)
        high = projected.norm(dim=0).clamp(min=2 * self.least)  # its length is at most 1
        for _ in range(60):
            middle = (low * high).sqrt()
            long = (projected / (self.values[:, None] + middle)).norm(dim=0) > 1
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
        self.ridge = high
        return (self.vectors @ (projected / (self.values[:, None] + high))).T.to(goal.dtype)

    def refine(self, steps: int) -> None:
        """Conjugate gradient steps on the error of the activations."""
        last: tuple[Tensor, Tensor, Tensor] | None = None
        for _ in range(steps):
            slope = torch.where(self.y + self.noise + self.bias < 0, SLOPE, 1.0).to(self.y)
            residual = self.activation - _leaky(self.y + self.noise + self.bias)
            down = residual * slope * self.weight
            gradient = self._descent(down)
            scaled = self.vectors.T @ gradient.double() / (self.values[:, None] + self.ridge)
            preconditioned = (self.vectors @ scaled).to(gradient)
            direction = preconditioned
            if last is not None:  # Polak and Ribiere's
                change = ((gradient - last[0]) * preconditioned).sum(dim=0)
                before = (last[0] * last[1]).sum(dim=0).clamp(min=1e-30)
                direction = preconditioned + (change / before).clamp(min=0) * last[2]
            last = gradient, preconditioned, direction
            curvature = (slope.square() * self.weight).sum(dim=(0, 1))
            self._step(direction.T, down.sum(dim=(0, 1)) / curvature, slope, residual)

    def _descent(self, down: Tensor) -> Tensor:
        """Minus half the gradient of the error in the filters, (T * I, O), through demodulation."""
        radial = (down * self.y).sum(dim=1) * self.gain[:, 0].square()
        return self._transposed(down * self.gain) - (self.power.T @ radial).repeat(self.taps, 1) * (
            self.filters.T
        )

    def _step(self, direction: Tensor, bias: Tensor, slope: Tensor, residual: Tensor) -> None:
        """Go along a direction of filters (O, T * I) and biases (O,), as far as it helps each."""
        raw = self._apply(direction)
        linear = slope * (raw * self.gain + bias)
        square = (linear.square() * self.weight).sum(dim=(0, 1)).clamp(min=1e-30)
        best = (residual * linear * self.weight).sum(dim=(0, 1)) / square
        length = torch.zeros_like(best)
        for factor in STEP_LENGTHS:
            tried = factor * best
            gain = self._demodulation(self.filters + tried[:, None] * direction)
            error = self._error((self.raw + tried * raw) * gain, self.bias + tried * bias)
            better = error < self.error
            self.error = torch.where(better, error, self.error)
            length = torch.where(better, tried, length)
        moved = self.filters + length[:, None] * direction
        norm = moved.norm(dim=1)
        self.filters, self.raw = moved / norm[:, None], (self.raw + length * raw) / norm
        self.gain = self._demodulation(self.filters)
        self.y = self.raw * self.gain
        self.bias = self.bias + length * bias


def store(layer: StyledConv, fit: LayerFit, scale: Tensor) -> None:
    """Give a layer the fitted filters and biases; scale: root mean square styles, (I,)."""
    _set_filters(layer.conv, fit.filters / scale.repeat(fit.taps))
    layer.activate.bias.copy_(fit.bias)


def fit_to_rgb(
    layer: ToRGB, prior: Tensor, rows: Tensor, target: Tensor, weight: Tensor, ridge: float
) -> None:
    """Fit a ToRGB's weights and bias, in place.

    Args:
        layer: the pruned generator's.
        prior: (3, I) weights that the ridge pulls to.
        rows: (R, I) modulated inputs.
        target: (R, 3) what is missing of the RGB sum.
        weight: (R,) of the positions.
        ridge: in units of the mean squared input.
    """
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1).double()
    weighted = rows * (weight / weight.sum())[:, None]
    start = torch.cat([prior, layer.bias.view(3, 1)], dim=1).double()
    moments = rows.T @ weighted
    pull = ridge * moments.diagonal().mean() + 1e-30
    moments.diagonal().add_(pull)
    solved = torch.linalg.solve(moments, weighted.T @ target.double() + pull * start.T)
    layer.conv.weight.copy_(solved[:-1].T.view_as(layer.conv.weight))
    layer.bias.copy_(solved[-1].view_as(layer.bias))
