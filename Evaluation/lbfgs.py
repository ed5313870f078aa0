"""L-BFGS for many independent problems at once.

`torch.optim.LBFGS` sees a batch as one problem: its members would share the step length and the
curvature, so that the result for an image would depend on its neighbours. Here every row has its
own; a batch only shares the passes through the network.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
"""Points (M, D) and the numbers of their problems (M,) -> values (M,), differentiable; the value of
a problem depends on its own point alone."""

SUFFICIENT_DECREASE, CURVATURE = 1e-4, 0.9
MAX_TRIALS = 25


def minimise(
    objective: Objective,
    start: Tensor,
    iterations: int,
    step: float = 1.0,
    history: int = 10,
    progress: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise N independent functions of D variables (Nocedal & Wright, 2006, algorithm 7.5).

    A problem whose line search fails restarts from steepest descent; where that fails too, it has
    reached its minimum up to rounding and stays there.

    Args:
        objective: see `Objective`.
        start: (N, D).
        iterations: search directions per problem.
        step: first step length tried along a quasi-Newton direction; 1 is Newton's.
        history: curvature pairs that are kept; memory is 2 * history * N * D values.
        progress: called after each iteration with the values (N,).

    Returns:
        The points (N, D), the values there (N,), and the evaluations spent on each (N,), int64.
    """
    x = start.detach().clone()
    n, device = len(x), x.device
    value, gradient = _evaluate(objective, x, torch.arange(n, device=device))
    evaluations = torch.ones(n, dtype=torch.int64, device=device)
    moves, turns = (x.new_zeros(history, *x.shape) for _ in range(2))
    # The weight 1 / (move * turn) of a pair; 0 takes it out of the sums, problem by problem.
    weight = x.new_zeros(history, n)
    scale = 1 / gradient.abs().sum(dim=1).clamp(min=1)
    finished = torch.zeros(n, dtype=torch.bool, device=device)
    # Step along -H g, then keep the moves of x and of its gradient as the newest pair of H.
    for k in range(iterations):
        order = [(k - 1 - i) % history for i in range(min(k, history))]
        direction = -_inverse_hessian_product(gradient, moves, turns, weight, scale, order)
        direction[finished] = 0
        new_x, new_value, new_gradient, trials = _line_search(
            objective, x, value, gradient, direction, step
        )
        move, turn = new_x - x, new_gradient - gradient
        x, value, gradient = new_x, new_value, new_gradient
        evaluations += trials
        curvature = _dot(move, turn)
        good = curvature > 1e-10 * _dot(turn, turn)
        stuck = ~move.any(dim=1)
        finished |= stuck & ~weight.any(dim=0)
        weight[:, stuck] = 0
        slot = k % history
        moves[slot], turns[slot] = move, turn
        weight[slot] = torch.where(good, 1 / curvature, 0)
        scale = torch.where(good, curvature / _dot(turn, turn), scale)
        if progress:
            progress(value)
    return x, value, evaluations


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=1)


def _evaluate(objective: Objective, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Compute values (M,) and gradients (M, D); the sum's gradient is each problem's own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = objective(x, rows)
        (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


def _inverse_hessian_product(
    gradient: Tensor, moves: Tensor, turns: Tensor, weight: Tensor, scale: Tensor, order: list[int]
) -> Tensor:
    """Run the two-loop recursion (algorithm 7.4) over the pairs of ``order``, newest first."""
    result = gradient.clone()
    alphas = []
    for i in order:
        alpha = weight[i] * _dot(moves[i], result)
        result -= alpha[:, None] * turns[i]
        alphas.append(alpha)
    result *= scale[:, None]
    for i, alpha in zip(reversed(order), reversed(alphas), strict=True):
        beta = weight[i] * _dot(turns[i], result)
        result += (alpha - beta)[:, None] * moves[i]
    return result


def _line_search(
    objective: Objective,
    x: Tensor,
    value: Tensor,
    gradient: Tensor,
    direction: Tensor,
    step: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find steps that meet the strong Wolfe conditions (eq. 3.7), by doubling and bisection.

    Between a step that is too short (steeply descending, with sufficient decrease) and one that is
    too long (without it, or ascending) there is always a step that meets them.

    Returns:
        Points, values, gradients, trials (N,). A problem whose trials run out takes its best point
        of sufficient decrease, or stays where it is.
    """
    x, value, gradient = x.clone(), value.clone(), gradient.clone()
    slope, start, first = _dot(gradient, direction), x.clone(), value.clone()
    length = torch.full_like(value, step)
    low, high = torch.zeros_like(value), torch.full_like(value, torch.inf)
    trials = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    rows = (slope < 0).nonzero()[:, 0]
    for _ in range(MAX_TRIALS):
        if not len(rows):
            break
        t = length[rows]
        point = start[rows] + t[:, None] * direction[rows]
        f, g = _evaluate(objective, point, rows)
        trials[rows] += 1
        s = _dot(g, direction[rows])
        decrease = f <= first[rows] + SUFFICIENT_DECREASE * t * slope[rows]
        done = decrease & (s.abs() <= -CURVATURE * slope[rows])
        take = done | (decrease & (f < value[rows]))
        taken = rows[take]
        x[taken], value[taken], gradient[taken] = point[take], f[take], g[take]
        too_long = ~decrease | (s > 0)
        low[rows] = torch.where(too_long, low[rows], t)
        high[rows] = torch.where(too_long, t, high[rows])
        length[rows] = torch.where(high[rows].isinf(), 2 * t, (low[rows] + high[rows]) / 2)
        rows = rows[~done]
    return x, value, gradient, trials
