"""Files that a stranger might send, and a folder of good ones to compare with."""

import os
import pickle
import zipfile

import numpy as np
import torch
from PIL import Image

import train
from Evaluation import feature_statistics
from Evaluation.feature_statistics import Statistics
from Evaluation.projection import Projection, save_projection
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.face_parser import BiSeNet
from Model.generator import Generator

CHANNELS = (6, 5, 4, 4)


class Attack:
    """Makes the folder ``attacked`` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("attacked",)


def make_files(folder):
    """Tiny files of every kind that the scripts read."""
    torch.manual_seed(0)
    generator = Generator(8, 8, 2, CHANNELS)
    content = {"g": generator, "g_ema": generator, "d": Discriminator(8, channels=(5, 4))}
    checkpoint.save(folder / "model.pt", content)
    parser = BiSeNet(19, width=4, stem_stride=1, input_size=32)
    parser.train()(torch.randn(4, 3, 32, 32))
    checkpoint.save(folder / "parser.pt", {"parser": parser, "config": parser.config})
    feature_statistics.save(folder / "stats.npz", Statistics(np.zeros(3), np.eye(3)))
    found = Projection(torch.randn(1, 4, 8), generator.make_noise(), torch.ones(1), torch.ones(1))
    save_projection(folder / "latents.npz", found, generator, "model.pt", ["a"])
    rng = np.random.default_rng(0)
    for place, n in (("data", 60), ("pairs/images", 6)):
        (folder / place).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / place / f"{i}.png")
    (folder / "pairs/labels").mkdir()
    for i in range(6):
        labels = rng.integers(0, 19, (8, 8), dtype=np.uint8)
        Image.fromarray(labels).save(folder / f"pairs/labels/{i}.png")
    flags = f"--path {folder}/data --ckpt {folder}/model.pt --out {folder}/run --iter 1"
    assert train.main(f"{flags} --batch_size 2 --workers 0 --device cpu".split()) == 0


def write_pickle(path):
    path.write_bytes(pickle.dumps({"g_ema": Attack(), "mean": Attack(), "w_plus": Attack()}))


def write_torch(path):
    torch.save({"g_ema": Attack(), "parser": Attack()}, path)


def write_old_torch(path):
    torch.save({"g_ema": Attack()}, path, _use_new_zipfile_serialization=False)


def write_objects(path):
    with open(path, "wb") as file:
        np.savez(file, w_plus=np.array([Attack()]), mean=np.array([Attack()]), cov=np.eye(1))


def write_bomb(path):
    """Two gigabytes of zeros in two megabytes, in the layout of both an .npz and a .pt file."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        header = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | {"shape": (2**27,)}
        for name in ("mean.npy", "w_plus.npy", "archive/data.pkl", "archive/data/0"):
            with archive.open(name, "w") as member:
                np.lib.format.write_array_header_1_0(member, header)
                for _ in range(8):
                    member.write(bytes(2**23))


def write_lie(path):
    """A zip archive whose directory claims a terabyte."""
    write_bomb(path) if not path.is_file() else None
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\x01\x02") + 24
    data[place : place + 4] = b"\xf0\xff\xff\xff"
    path.write_bytes(data)


def write_truncated(path):
    whole = path.with_name("whole.pt")
    torch.save({"g_ema": {"x": torch.zeros(1000)}, "mean": torch.zeros(9)}, whole)
    path.write_bytes(whole.read_bytes()[:-600])
    whole.unlink()


def write_huge_header(path):
    """An array file of which only the header is there, and claims 8 TB."""
    with zipfile.ZipFile(path, "w") as archive:
        header = np.lib.format.header_data_from_array_1_0(np.zeros(1)) | {"shape": (2**40,)}
        for name in ("mean.npy", "cov.npy", "w_plus.npy", "noise_0.npy"):
            with archive.open(name, "w") as member:
                np.lib.format.write_array_header_1_0(member, header)


KINDS = {
    "pickle": write_pickle,
    "torch": write_torch,
    "old_torch": write_old_torch,
    "objects": write_objects,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404: not found</html>\n" * 50),
    "list": lambda path: torch.save([1, 2], path),
    "truncated": write_truncated,
    "bomb": write_bomb,
    "lie": write_lie,
    "huge_header": write_huge_header,
}
