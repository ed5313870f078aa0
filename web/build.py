"""Builds the page that runs the bundled models in a browser, into web/dist.

``python -m web.build``, or ``make web``, which installs what it needs. The page is static: any file
server will do, and it loads nothing from elsewhere. ONNX Runtime comes from the npm registry in the
version and with the checksum of package-lock.json.
"""

import dataclasses
import filecmp
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from Evaluation import sampling
from Evaluation.directions import components_of
from Evaluation.editing import STYLE_LAYERS
from Model import bundled, checkpoint
from Model.complexity import macs, parameters
from Model.generator import Generator
from Model.onnx import Form, check_packages, describe, save_onnx
from Util.cli import run_settings
from Util.device import pick_device
from Util.files import atomic_path
from Util.settings import SettingError, Settings, setting

HERE = Path(__file__).resolve().parent
MODELS = {"teacher": bundled.MODEL, "compressed": bundled.COMPRESSED}
RUNTIME = (
    "ort.wasm.min.mjs",
    "ort-wasm-simd-threaded.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)
EXAMPLES = """example:
  python3 -m web.build && python3 -m http.server --directory web/dist
      then open http://localhost:8000
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebSettings(Settings):
    """What the page shows."""

    out: Path = setting(
        HERE / "dist", "folder to write; what is in it is replaced", metavar="FOLDER"
    )
    n_faces: int = setting(12, "faces to choose from: images 0, 1, ... of seed 0", low=10)
    n_directions: int = setting(6, "sliders", low=1)
    n_sample: int = setting(4096, "w that the sliders' directions are found from", low=64)


def matching_directions(w: Tensor, other_w: Tensor, directions: Tensor) -> Tensor:
    """What another mapping network does where this one goes along its principal directions.

    The regression of the other's w on coordinates along the directions, which are uncorrelated and
    have unit variance: the mean of coordinate times w.

    Args:
        w: (N, style_dim), which has these principal directions.
        other_w: (N, style_dim) of the same z.
        directions: (n, style_dim), principal components, each one standard deviation long.

    Returns:
        (n, style_dim).
    """
    coordinates = (w - w.mean(0)) @ (directions / directions.square().sum(1, keepdim=True)).T
    return coordinates.T @ (other_w - other_w.mean(0)) / (len(w) - 1)


def layer_groups(n_latent: int) -> dict[str, list[int]]:
    """First layer, and the one after the last, of the groups that `get_edited_image.py` names."""
    return {
        name: [min(end, n_latent) for end in (layers.start, layers.stop)]
        for name, layers in STYLE_LAYERS.items()
    }


def _rounded(values: Tensor) -> list[Any]:
    return [[round(x, 6) for x in row] for row in values.tolist()]


def describe_latents(models: Sequence[Generator], settings: WebSettings) -> dict[str, Any]:
    """What the page needs to know of the latents of several models that share z."""
    first = models[0]
    z = sampling.draw_z(first, range(settings.n_sample), seed=1)
    spaces = [model.mapping(z) for model in models]
    found = components_of(spaces[0])
    directions, shares = (
        part[: settings.n_directions]
        for part in (found.components * found.deviations[:, None], found.shares)
    )
    return {
        "z": sampling.draw_z(first, range(settings.n_faces), seed=0).tolist(),
        "layers": layer_groups(first.n_latent),
        "shares": [round(share, 4) for share in shares.tolist()],
        "directions": [_rounded(matching_directions(spaces[0], w, directions)) for w in spaces],
    }


def write_model(name: str, generator: Generator, folder: Path) -> dict[str, Any]:
    """Write a model's two files; returns what the page says of it."""
    w_mean = sampling.mean_latent(generator, seed=0)
    files = {"synthesis": Form(input="w_plus"), "mapping": Form(output="w")}
    for part, form in files.items():
        about = describe(generator, form, bundled.LICENCE, MODELS[name].name)
        save_onnx(folder / f"{name}_{part}.onnx", generator, w_mean, form, about)
    return {
        "name": name,
        "size": generator.size,
        "n_latent": generator.n_latent,
        "macs": macs(generator),
        "parameters": parameters(generator),
        "bytes": sum((folder / f"{name}_{part}.onnx").stat().st_size for part in files),
    }


def copy_runtime(folder: Path) -> None:
    """Install ONNX Runtime from the npm registry, and copy what the page loads.

    Raises:
        ValueError: npm is missing or fails; says what it said.
    """
    if shutil.which("npm") is None:
        raise ValueError("npm is missing, which brings ONNX Runtime; install Node.js with npm")
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"npm could not bring ONNX Runtime: {done.stderr.strip()[-300:]}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in RUNTIME:
        shutil.copy(HERE / "node_modules/onnxruntime-web/dist" / name, folder / name)


@torch.no_grad()
def build(settings: WebSettings) -> Path:
    """Write the page; returns its folder.

    Raises:
        ValueError: packages or npm are missing, or the folder holds something else.
    """
    check_packages()
    out = settings.out
    page, begun = HERE / "page", out / "index.html"
    whole = (out / "data.json").is_file()
    ours = whole or (begun.is_file() and filecmp.cmp(begun, page / "index.html", shallow=False))
    if out.exists() and any(out.iterdir()) and not ours:
        raise SettingError("out", f"{out} holds files that are no such page; name another folder")
    shutil.copytree(page, out, dirs_exist_ok=True)
    copy_runtime(out / "vendor")
    generators = {name: checkpoint.load_generator(path).eval() for name, path in MODELS.items()}
    data = {
        "models": [write_model(name, g, out / "models") for name, g in generators.items()],
        **describe_latents(list(generators.values()), settings),
    }
    with atomic_path(out / "data.json") as temporary:
        temporary.write_text(json.dumps(data, separators=(",", ":")))
    return out


def run(settings: WebSettings) -> None:
    """Build the page, and say how to look at it."""
    pick_device("cpu")
    folder = build(settings)
    print(f"wrote {folder}\nlook at it: python3 -m http.server --directory {folder}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_settings(
        WebSettings, run, argv, prog="python -m web.build", description=__doc__, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
