"""Writes generators as ONNX files, each compared with PyTorch before it gets its name."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from Evaluation import sampling
from Model import bundled, checkpoint
from Model.onnx import Form, Parity, check_packages, describe, save_onnx
from Util.cli import check_writable, run_settings
from Util.device import pick_device
from Util.settings import SettingError, blame, setting

EXAMPLES = """examples:
  python3 export_onnx.py
      the bundled models, beside their checkpoints
  python3 export_onnx.py --ckpt FULL.pt SMALL.pt --input w_plus --half --out onnx
      two models for style mixing and editing, in half precision, in the folder onnx
  python3 export_onnx.py --ckpt SMALL.pt --output w
      the mapping network alone: what makes the w of those two

A file is run with, for example:
  session = onnxruntime.InferenceSession("SMALL.onnx")
  (images,) = session.run(None, {"z": z, "psi": numpy.array([0.7], "float32")})
"""


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Form):
    """Which models become ONNX files, of which form, and where."""

    ckpt: tuple[Path, ...] = setting(
        (bundled.MODEL, bundled.COMPRESSED),
        "generator checkpoints; their g_ema is taken (default: bundled)",
        nargs="+",
        metavar="FILE",
        exists="file",
    )
    out: Path | None = setting(
        None,
        "file to write (with one checkpoint), or a folder (default: CKPT with the ending .onnx)",
        metavar="FILE",
    )
    licence: str = setting(
        "", "licence that the file states (default: that of a bundled model)", metavar="TEXT"
    )

    @property
    def targets(self) -> list[Path]:
        """The file of each checkpoint.

        Raises:
            SettingError: two would be the same, or one file stands for several.
        """
        if self.out and self.out.suffix == ".onnx" and not self.out.is_dir():
            if len(self.ckpt) > 1:
                raise SettingError("out", f"{self.out}: name a folder for several checkpoints")
            return [self.out]
        folders = [self.out or ckpt.parent for ckpt in self.ckpt]
        pairs = zip(folders, self.ckpt, strict=True)
        files = [folder / f"{ckpt.stem}.onnx" for folder, ckpt in pairs]
        if len(set(files)) < len(files):
            name = "out" if self.out else "ckpt"
            raise SettingError(name, f"{self.out or files[0]}: two checkpoints have the same name")
        return files


def summary(file: Path, about: Mapping[str, str], found: Parity) -> str:
    """What was written, and how well it agrees."""
    differs = f"{found.largest:.1e}"
    if about["output"] == "image":
        differs = f"{127.5 * found.largest:.2g} grey levels (PSNR {found.psnr:.0f} dB)"
    parameters, macs = int(about["parameters"]), int(about["macs"])
    return (
        f"saved {file}: {file.stat().st_size / 1e6:.2f} MB, {parameters:,} parameters,"
        f" {macs:,} MACs; ONNX Runtime differs from PyTorch by at most {differs}"
    )


def export(settings: ExportSettings, ckpt: Path, target: Path) -> str:
    """Write the file of one checkpoint; returns a summary.

    Raises:
        ValueError: names the setting or file.
    """
    with blame("ckpt"):
        generator = checkpoint.load_generator(ckpt).eval().requires_grad_(False)
    w_mean = sampling.mean_latent(generator, seed=0)
    licence = settings.licence or bundled.licence(ckpt) or "not stated"
    about = describe(generator, settings, licence, ckpt.name)
    return summary(target, about, save_onnx(target, generator, w_mean, settings, about))


def run(settings: ExportSettings) -> None:
    """Write all files.

    Raises:
        ValueError: names the setting or file.
    """
    check_packages()
    pick_device("cpu")
    targets = settings.targets
    for target in targets:
        check_writable("out", target)
    for ckpt, target in zip(settings.ckpt, targets, strict=True):
        print(export(settings, ckpt, target), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    return run_settings(
        ExportSettings, run, argv, prog="export_onnx.py", description=__doc__, epilog=EXAMPLES
    )


if __name__ == "__main__":
    sys.exit(main())
