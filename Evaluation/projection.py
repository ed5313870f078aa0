"""Projection: the latent and the layer noise from which a generator makes a given picture."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from Evaluation.distances import Distance
from Evaluation.lbfgs import minimise
from Evaluation.sampling import mean_latent, synthesise
from Model.generator import Generator
from Util.files import atomic_path, read_npz

LEARNING_RATE = {"lbfgs": 1.0, "adam": 0.1}
"""Default of each optimiser: the step first tried by L-BFGS's line search; Adam's step size."""


@dataclass(frozen=True)
class Projection:
    """N projected pictures.

    Attributes:
        w_plus: (N, n_latent, style_dim).
        noise: one (N, 1, h, w) per styled convolution.
        loss: (N,), what the optimiser reached.
        evaluations: (N,) int64, forward and backward passes spent on each.
    """

    w_plus: Tensor
    noise: list[Tensor]
    loss: Tensor
    evaluations: Tensor

    def part(self, i: int) -> "Projection":
        """Return the projection of picture ``i`` alone."""
        one = slice(i, i + 1)
        noise = [maps[one] for maps in self.noise]
        return Projection(self.w_plus[one], noise, self.loss[one], self.evaluations[one])


def project(
    generator: Generator,
    images: Tensor,
    perceptual: Distance,
    *,
    optimizer: str = "lbfgs",
    num_iters: int = 800,
    lr: float | None = None,
    mse_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    seed: int = 0,
    progress: Callable[[Tensor], None] | None = None,
) -> Projection:
    """Find w+ and layer noise by minimising the mean squared error plus a perceptual distance.

    All pictures start from the mean w and the stored noise maps. A picture's neighbours in the
    batch have no part in its search: L-BFGS keeps a step length and a curvature for each, Adam
    works value by value. Only the rounding of the convolutions depends on the batch's size, which
    a search amplifies: equal digits need equal sizes.

    Args:
        generator: frozen, on the images' device.
        images: (N, 3, size, size) in [-1, 1].
        perceptual: see `Distance`; differentiable.
        optimizer: "lbfgs" (strong Wolfe line search) or "adam" (cosine decay to 0).
        num_iters: search directions of L-BFGS, each with a line search of mostly one evaluation;
            steps of Adam.
        lr: see `LEARNING_RATE`; None takes the default there.
        mse_weight: of the mean squared error over all values.
        perceptual_weight: of the perceptual distance.
        seed: of the z behind the mean w, >= 0.
        progress: called after each iteration with the losses (N,).

    Raises:
        ValueError: the images are not of the generator's size.
    """
    if images.shape[1:] != (3, generator.size, generator.size):
        raise ValueError(f"images {tuple(images.shape)}; expected (N, 3, {generator.size}, same)")

    def objective(x: Tensor, rows: Tensor) -> Tensor:
        made = synthesise(generator, *_unflatten(generator, x))
        error = (made - images[rows]).square().mean(dim=(1, 2, 3))
        return mse_weight * error + perceptual_weight * perceptual(made, images[rows])

    w = mean_latent(generator, seed)[:, None].expand(-1, generator.n_latent, -1)
    start = torch.cat([part.flatten(1) for part in (w, *generator.fixed_noise)], dim=1)
    start = start.repeat(len(images), 1)
    default = LEARNING_RATE[optimizer]
    lr = default if lr is None else lr
    minimiser = minimise if optimizer == "lbfgs" else _adam
    x, loss, evaluations = minimiser(objective, start, num_iters, lr, progress=progress)
    return Projection(*_unflatten(generator, x), loss, evaluations)


def _unflatten(generator: Generator, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Split points (N, D) into w+ and noise maps."""
    shapes = [torch.Size((generator.n_latent, generator.style_dim))]
    shapes += [noise.shape[1:] for noise in generator.fixed_noise]
    parts = x.split([shape.numel() for shape in shapes], dim=1)
    w_plus, *noise = (part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
    return w_plus, noise


def _adam(
    objective: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    iterations: int,
    lr: float,
    progress: Callable[[Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimise by gradient steps; see `minimise`."""
    x, rows = start.clone().requires_grad_(), torch.arange(len(start), device=start.device)
    adam = torch.optim.Adam([x], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, iterations)
    for _ in range(iterations):
        loss = objective(x, rows)
        (x.grad,) = torch.autograd.grad(loss.sum(), x)
        adam.step()
        schedule.step()
        if progress:
            progress(loss.detach())
    x = x.detach()
    with torch.no_grad():
        return x, objective(x, rows), torch.full_like(rows, iterations + 1)


def fingerprint(generator: Generator) -> str:
    """Compute a digest of all tensors, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in generator.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_projection(
    path: str | PathLike[str],
    projection: Projection,
    generator: Generator,
    model: str,
    sources: list[str],
) -> None:
    """Write an .npz, atomically: the fields, ``noise_0``, ``noise_1``, ... and where it is from.

    Args:
        path: target.
        projection: of N pictures.
        generator: it belongs to.
        model: the generator's file.
        sources: names of the N pictures.
    """
    tensors = {name: value for name, value in vars(projection).items() if name != "noise"}
    tensors |= {f"noise_{i}": noise for i, noise in enumerate(projection.noise)}
    arrays: dict[str, Any] = {name: value.cpu().numpy() for name, value in tensors.items()}
    arrays |= {"model": model, "fingerprint": fingerprint(generator), "sources": sources}
    with atomic_path(path) as temporary:
        np.savez(temporary, **arrays)


def load_projection(path: str | PathLike[str], generator: Generator | None = None) -> Projection:
    """Read what `save_projection` wrote, without running any code from it.

    Args:
        path: .npz file.
        generator: the one it must have been made with; the tensors go to its device. None takes
            any projection, onto the CPU.

    Raises:
        ValueError: it is no projection, or was made with another generator; names the file.
    """
    try:
        arrays = read_npz(path)
        names = [f"noise_{i}" for i in range(arrays["w_plus"].shape[1] - 1)]
        fields = ("w_plus", "loss", "evaluations", *names)
        device = generator.device if generator else "cpu"
        tensors = {name: torch.from_numpy(arrays[name]).to(device) for name in fields}
        noise = [tensors.pop(name) for name in names]
        projection = Projection(**tensors, noise=noise)
        model, made_with = str(arrays["model"]), str(arrays["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: no projection of get_projected_image.py ({reason})") from None
    if generator and made_with != fingerprint(generator):
        raise ValueError(
            f"{path}: made with other weights (those of {model}); project the picture with this"
            " model"
        )
    if generator:
        _check_fit(projection, generator, path)
    return projection


def _check_fit(projection: Projection, generator: Generator, path: str | PathLike[str]) -> None:
    """Refuse tensors that are not of the generator's shapes, not floats, or not finite."""
    n = len(projection.w_plus)
    expected = [(n, generator.n_latent, generator.style_dim)]
    expected += [(n, *maps.shape[1:]) for maps in generator.fixed_noise]
    tensors = [projection.w_plus, *projection.noise]
    fits = [tuple(t.shape) for t in tensors] == expected
    if (
        not n
        or not fits
        or not all(t.dtype == torch.float32 and t.isfinite().all() for t in tensors)
    ):
        raise ValueError(
            f"{path}: damaged, its w_plus or noise does not fit the model; project the pictures"
            " again"
        )
