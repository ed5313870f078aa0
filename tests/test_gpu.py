"""What runs on a GPU, run on one: networks, training, every script. ``pytest -m gpu``.

The operators' comparison with the reference is in `tests.test_native_ops`, with the same mark.
"""

import copy
import importlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import get_generated_image
import train
from Compression.training import Trainer
from Model import bundled, checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from tests.hostile import make_files
from train_hyperparams import TrainConfig
from Util.device import pick_device
from Util.memory import imagined
from Util.run_log import newest_checkpoint, read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
DEVICE = "cuda"
CHANNELS = (64, 48, 48, 32, 32, 32)
PARSED = "--perceptual parser --parser_ckpt parser.pt"
SCRIPTS = {
    "prune": "--ckpt model.pt --parser_ckpt parser.pt --n_sample 4 --batch_size 2 --out p.pt"
    " --metric diversity_aware",
    "train_parser": "--path pairs --out new.pt --size 16 --iter 2 --batch_size 2",
    "get_fid": "--ckpt model.pt --parser_ckpt parser.pt --features parser --path data --workers 0"
    " --n_sample 60 --metrics fid,kid,pr --content_aware",
    "get_ppl": f"--ckpt model.pt {PARSED} --n_sample 4",
    "get_projected_image": f"--ckpt model.pt {PARSED} --n_sample 2 --num_iters 3 --out projected",
    "get_generated_image": "--ckpt model.pt model.pt --names a b --frames 2 --out g",
    "get_edited_image": f"--ckpt model.pt {PARSED} --out e --mode morphing --frames 2",
    "Compression.content_picture": "--ckpt model.pt --parser parser.pt --n_sample 2 --out c.png",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    make_files(folder)
    return folder


@pytest.fixture
def work(files, monkeypatch):
    """The folder of files, as the current one."""
    monkeypatch.chdir(files)
    return files


@pytest.fixture
def networks():
    torch.manual_seed(0)
    generator = Generator(16, 32, 2, CHANNELS).requires_grad_(False)
    for layer in generator.styled_convs:
        layer.noise.weight.fill_(0.5)
    return generator.requires_grad_(True), Discriminator(16, channels=(48, 32, 32))


def on_both(*modules):
    """Copies in float64 on the CPU, and in float32 on the GPU."""
    pick_device(DEVICE)
    return [
        copy.deepcopy(nn.ModuleList(modules)).to(*to) for to in (("cpu", torch.double), (DEVICE,))
    ]


@pytest.mark.parametrize(("tf32", "low", "high"), [(False, 0, 1e-5), (True, 5e-5, 1e-2)])
def test_products_are_rounded_if_and_only_if_tf32_is_given(tf32, low, high):
    if tf32 and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TensorFloat-32")
    device = pick_device(DEVICE, tf32)
    x, w = torch.randn(4, 64, 32, 32), torch.randn(64, 64, 3, 3)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    for operator, *factors in ((nn.functional.conv2d, x, w), (torch.mm, a, b)):
        exact = operator(*(f.double() for f in factors))
        found = operator(*(f.to(device) for f in factors)).double().cpu()
        error = ((found - exact).square().mean() / exact.square().mean()).sqrt().item()
        assert low <= error < high


def test_images_logits_and_regularisers_are_those_of_float64(networks):
    z, w_plus = torch.randn(4, 32), torch.randn(4, 6, 32)
    results = []
    for generator, discriminator in on_both(*networks):
        own = {"dtype": next(generator.parameters()).dtype, "device": generator.device}
        image = generator([z.to(**own)], randomize_noise=False)
        real = image.detach().requires_grad_()
        logits = discriminator(real)
        # R1 and path length: gradients of gradients.
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        r1 = slope.square().sum()
        w = w_plus.to(**own).requires_grad_()
        made = generator.synthesis(w, "fixed").image
        (jacobian,) = torch.autograd.grad((made * made.detach()).sum(), w, create_graph=True)
        length = jacobian.square().sum()
        weight = discriminator.final_conv[0].weight
        conv = generator.convs[1].conv.weight
        found = [image, logits, r1, length]
        found += torch.autograd.grad(r1, weight)
        found += torch.autograd.grad(length, conv)
        results.append([t.detach().double().cpu() for t in found])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_short_training_with_all_phases(work, amp):
    """Distils from the bundled teacher inside its content; resumed, it goes on where it was."""
    teacher = f"--ckpt {bundled.MODEL} --teacher_ckpt {bundled.MODEL} --perceptual parser"
    flags = (
        f"--path data {teacher} --out run-{amp} --amp {amp} --batch_size 4 --workers 1"
        f" --device {DEVICE} --d_reg_every 2 --g_reg_every 2 --log_freq 1 --fid_n_sample 0"
    )
    assert train.main(f"{flags} --iter 3".split()) == 0
    assert train.main(f"--resume run-{amp} --device {DEVICE} --iter 4".split()) == 0
    rows = read_metrics(work / f"run-{amp}")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(value) for row in rows for value in row.values())
    newest = newest_checkpoint(work / f"run-{amp}")
    kept, before = checkpoint.load_generator(newest), checkpoint.load_generator(bundled.MODEL)
    assert not torch.equal(kept.conv1.conv.weight, before.conv1.conv.weight)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_runs(work, script):
    flags = f"{SCRIPTS[script]} --device {DEVICE}".split()
    assert importlib.import_module(script).main(flags) == 0


def test_pictures_are_those_of_the_cpu(work):
    pixels = []
    for device in ("cpu", DEVICE):
        flags = f"--ckpt {bundled.MODEL} --frames 0 --n_sample 3 --device {device} --out {device}"
        assert get_generated_image.main(flags.split()) == 0
        pixels.append(np.asarray(Image.open(f"{device}.png")).astype(int))
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_the_memory_of_an_iteration_is_what_was_counted(networks, capsys):
    device = pick_device(DEVICE)
    generator = Generator(128, channels=(128,) * 12)
    discriminator = Discriminator(128, channels=(128,) * 6)
    trainer = Trainer(generator, discriminator, TrainConfig(batch_size=8), device)
    real = torch.rand(8, 3, 128, 128, device=device) * 2 - 1
    with imagined(trainer) as (copied, meter):
        copied.iterate(torch.empty_like(real))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.iterate(real)
    needed = torch.cuda.max_memory_allocated() - before
    with capsys.disabled():
        print(json.dumps({"counted": meter.peak, "needed": needed}))
    assert 0.7 < needed / meter.peak < 1.5
