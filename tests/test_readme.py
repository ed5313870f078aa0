"""The worked example of README.md, its own lines, made small."""

import re
import shlex
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import get_fid
import prune
import train
import train_parser
from Compression import content_picture
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator

README = Path(__file__).resolve().parent.parent / "README.md"
SCRIPTS = {
    "train_parser.py": (train_parser, "--size 16 --image_size 16 --width 4 --iter 4 --workers 0"),
    "Compression.content": (content_picture, "--n_sample 4"),
    "prune.py": (prune, "--n_sample 4 --batch_size 2"),
    # LPIPS and Inception would be downloaded.
    "train.py": (train, "--iter 2 --batch_size 2 --workers 0 --perceptual parser --device cpu"),
    "get_fid.py": (get_fid, "--features parser --parser parser.pt --n_sample 8 --workers 0"),
}
"""What runs a line, and the flags after its own that make it small."""


def example():
    """The commands of the section, as lists of words."""
    section = README.read_text().split("## Other content than faces")[1]
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.S)[:1]
    lines = block.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if not line.startswith("#")]


def make_data(folder):
    """Squares of four classes on noise, with their maps, and a tiny full-size model."""
    rng = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (folder / "DATA" / kind).mkdir(parents=True)
    for i in range(20):
        labels = np.zeros((16, 16), dtype=np.uint8)
        labels[4:12, 4:12] = 1 + i % 4
        pixels = rng.integers(0, 99, (16, 16, 3), dtype=np.uint8) + 30 * labels[..., None]
        Image.fromarray(pixels).save(folder / f"DATA/images/{i}.png")
        Image.fromarray(labels).save(folder / f"DATA/labels/{i}.png")
    networks = {"g_ema": Generator(16, 8, 2, (6, 6, 5, 5, 4, 4))}
    checkpoint.save(folder / "FULL.pt", networks | {"d": Discriminator(16, channels=(6, 5, 4))})


def test_the_worked_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    make_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    commands = example()
    assert [words[:2] + words[2:3] * (words[1] == "-m") for words in commands] == [
        ["python3", "train_parser.py"],
        ["python3", "-m", "Compression.content"],
        ["python3", "prune.py"],
        ["python3", "train.py"],
        ["python3", "get_fid.py"],
        ["python3", "get_fid.py"],
    ]
    for words in commands:
        name, *flags = words[2:] if words[1] == "-m" else words[1:]
        script, small = SCRIPTS[name]
        assert script.main([*flags, *small.split()]) == 0, capsys.readouterr().err
    config = checkpoint.read("runs/mine")["config"]
    assert config["training"]["content"] == "all,-0"
    assert Image.open("content.png").width > 100
    assert capsys.readouterr().out.count("Frechet parser distance") == 2


def test_its_table_of_recipes_is_that_of_the_study():
    study = (README.parent / "doc/Study.md").read_text().splitlines()
    section = README.read_text().split("## What is true of it")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 4
    assert [row for row in rows if row not in study] == []


def test_the_pages_it_links_to_are_there():
    for page in re.findall(r"\]\(((?!http|#)[^)]+)\)", README.read_text()):
        assert (README.parent / page.partition("#")[0]).exists(), page
