"""DiME's moments against their definition, the file that keeps them, and the networks."""

import numpy as np
import pytest
import torch
from torch import nn

from Compression import distillation
from Compression.distillation import moments
from Compression.distillation.moments import MomentsSettings
from Evaluation import embeddings, sampling
from Evaluation.clip import AttentionPool, ClipResNet, load_clip
from Evaluation.embeddings import Embedding, load_embedding
from Model import bundled, checkpoint
from Model.generator import Generator
from train_hyperparams import TrainConfig
from Util.settings import SettingError

CPU = torch.device("cpu")


class Colours(nn.Module):
    """Mean colours and their products: a network of three and six features."""

    def forward(self, x):
        mean = x.mean(dim=(2, 3))
        return torch.cat([mean, mean * mean.roll(1, dims=1)], dim=1)


@pytest.fixture
def teacher(tmp_path):
    torch.manual_seed(0)
    network = Generator(8, 8, 2, (5, 5, 4, 4)).requires_grad_(False)
    checkpoint.save(tmp_path / "teacher.pt", {"g_ema": network})
    return network


def networks():
    return {
        "dino": Embedding(lambda x: Colours()(x), "colours"),
        "clip": Embedding(lambda x: x.flatten(1)[:, :7], "seven values"),
    }


def student_pass(images):
    made = type("Made", (), {"image": images})()
    return type("Student", (), {"made": made})()


def test_loss_by_its_definition():
    images = torch.randn(4, 3, 8, 8, requires_grad=True)
    target = {"dino": (torch.randn(6), torch.rand(6)), "clip": (torch.randn(7), torch.rand(7))}
    weights = {"dino": 20.0, "clip": 15.0}
    call = moments.term(networks(), weights, target)
    actual = call(student_pass(images), None, None)
    expected = 0.0
    for name, weight in weights.items():
        phi = networks()[name].network(images).tolist()
        for power, mu in zip((1, 2), target[name], strict=True):
            gaps = [
                abs(sum(row[d] ** power for row in phi) / len(phi) - mu[d].item())
                for d in range(len(mu))
            ]
            expected += weight * sum(gaps) / len(gaps)
    assert actual.item() == pytest.approx(expected, rel=1e-4)
    actual.backward()
    with torch.no_grad():
        step = torch.zeros_like(images)
        step[1, 2, 0, 3] = 1e-2
        values = [call(student_pass(images + sign * step), None, None).item() for sign in (1, -1)]
    slope = (values[0] - values[1]) / 2e-2
    assert images.grad[1, 2, 0, 3].item() == pytest.approx(slope, rel=0.05, abs=1e-3)


def test_teachers_moments_are_those_of_its_pictures(teacher, monkeypatch):
    monkeypatch.setattr(moments, "BATCH", 3)
    found = moments.teacher_moments(teacher, networks(), 8)
    pictures = sampling.images(teacher, range(8), seed=0)
    for name, embedding in networks().items():
        phi = embedding.network(pictures)
        torch.testing.assert_close(found[name][0], phi.mean(dim=0))
        torch.testing.assert_close(found[name][1], phi.square().mean(dim=0))


def sources(tmp_path, teacher, dry_run=False, **options):
    config = TrainConfig(teacher_ckpt=str(tmp_path / "teacher.pt"), dry_run=dry_run)
    settings = MomentsSettings(**{"moments_n_sample": 6, **options})
    return distillation.Sources(config, teacher, CPU, options=settings)


def test_moments_are_kept_beside_the_teacher(tmp_path, teacher):
    first = moments.TeacherMoments(sources(tmp_path, teacher), networks())
    assert not first.found
    first.prepare()
    (file,) = tmp_path.glob("*.npz")
    assert file.name.startswith("teacher.moments-")
    second = moments.TeacherMoments(sources(tmp_path, teacher), networks())
    for name, pair in first.found.items():
        for a, b in zip(pair, second.found[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    other = moments.TeacherMoments(sources(tmp_path, teacher, moments_n_sample=7), networks())
    assert not other.found  # those of seven pictures are others
    assert other.file != file


def test_the_teacher_may_be_a_runs_folder(tmp_path, teacher):
    of_the_file = moments.TeacherMoments(sources(tmp_path, teacher), networks())
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    (folder / "000004.pt").write_bytes((tmp_path / "teacher.pt").read_bytes())
    config = TrainConfig(teacher_ckpt=str(tmp_path / "run"))
    named = distillation.Sources(config, teacher, CPU, options=MomentsSettings(moments_n_sample=6))
    found = moments.TeacherMoments(named, networks())
    assert found.protocol == of_the_file.protocol
    assert found.file.parent == folder


def test_a_dry_run_keeps_nothing(tmp_path, teacher):
    target = moments.TeacherMoments(sources(tmp_path, teacher, dry_run=True), networks())
    target.prepare()
    assert target.found["dino"][0].shape == (6,)
    assert not list(tmp_path.glob("*.npz"))


def test_a_named_file_of_something_else_is_refused(tmp_path, teacher):
    file = tmp_path / "m.npz"
    for content in ({"x": np.zeros(3)}, {"protocol": np.array("other")}):
        np.savez(file, **content)
        with pytest.raises(SettingError, match=r"moments_file .*m\.npz: holds "):
            moments.TeacherMoments(sources(tmp_path, teacher, moments_file=str(file)), networks())
    file.write_text("no archive")
    with pytest.raises(SettingError, match=r"moments_file .*m\.npz: no whole zip"):
        moments.TeacherMoments(sources(tmp_path, teacher, moments_file=str(file)), networks())


@pytest.mark.parametrize("values", [np.full(6, np.nan), np.zeros((2, 3)), np.zeros(6, int)])
def test_a_damaged_file_is_refused(tmp_path, teacher, values):
    target = moments.TeacherMoments(sources(tmp_path, teacher), networks())
    target.prepare()
    content = dict(np.load(target.file)) | {"dino_1": values}
    np.savez(target.file, **content)
    with pytest.raises(SettingError, match="is damaged; remove it"):
        moments.TeacherMoments(sources(tmp_path, teacher), networks())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ((), "is empty; name some of dino, clip, parser"),
        (("dino",), "dino: expected NAME=WEIGHT"),
        (("dino=0",), "dino=0: expected"),
        (("vgg=1",), "vgg=1: expected"),
        (("dino=nan",), "dino=nan: expected"),
    ],
)
def test_networks_that_make_no_sense_are_refused(text, message):
    with pytest.raises(SettingError, match=message):
        MomentsSettings(moments_networks=text).networks()


def test_the_log_says_which_networks():
    assert moments.label(MomentsSettings()) == "moments_dino_clip"
    assert moments.label(MomentsSettings(moments_networks=("parser=20",))) == "moments_parser"


def test_parser_features_serve_offline():
    made = load_embedding("parser", None, lambda: bundled.PARSER, CPU)
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    made.network(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert "face parser" in made.protocol


def test_dino_file(tmp_path):
    torch.manual_seed(0)
    network = embeddings.torchvision.models.resnet50(weights=None)
    weights = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    torch.save(weights, tmp_path / "dino.pth")
    made = load_embedding("dino", tmp_path / "dino.pth", lambda: "", CPU)
    images = torch.randn(1, 3, 32, 32)
    network.eval()
    expected = images
    for name, layer in network.named_children():
        if name == "fc":
            break
        expected = layer(expected)
    torch.testing.assert_close(made.network(images), expected.flatten(1), rtol=1e-3, atol=1e-3)
    assert made.network.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    # float32 on anything but a CPU: planes.
    elsewhere = load_embedding("dino", tmp_path / "dino.pth", lambda: "", torch.device("meta"))
    assert elsewhere.network.conv1.weight.is_contiguous()
    torch.save(dict(list(weights.items())[5:]), tmp_path / "part.pth")
    with pytest.raises(SettingError, match=r"dino_ckpt .*part\.pth lacks tensor .*dino_resnet50"):
        load_embedding("dino", tmp_path / "part.pth", lambda: "", CPU)


def test_no_download_of_dino_is_one_line(tmp_path, monkeypatch):
    asked = []

    def fail(url, file, hash_prefix):
        asked.append((url, hash_prefix))
        raise OSError("offline")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(SettingError, match=r"^dino_ckpt .*dino_resnet50_pretrain\.pth is missing"):
        load_embedding("dino", None, lambda: "", CPU)
    assert asked == [(embeddings.DINO_URL, None)]  # the name has no digits of a checksum


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_clip_wants_tensors_and_runs_no_program(tmp_path):
    with pytest.raises(SettingError, match="clip_ckpt is missing; name the tensors"):
        load_embedding("clip", None, lambda: "", CPU)
    program = torch.jit.script(nn.Linear(2, 2))
    program.save(str(tmp_path / "RN50.pt"))
    with pytest.raises(SettingError, match=r"clip_ckpt .*torch\.jit\.load"):
        load_embedding("clip", tmp_path / "RN50.pt", lambda: "", CPU)


def test_clip_file_of_the_encoder_or_of_the_whole_model(tmp_path):
    weights = ClipResNet().state_dict()
    torch.save(weights, tmp_path / "encoder.pt")
    torch.save(
        {"logit_scale": torch.ones(()), **{f"visual.{k}": v for k, v in weights.items()}},
        tmp_path / "whole.pt",
    )
    for name in ("encoder.pt", "whole.pt"):
        found = load_clip(tmp_path / name).state_dict()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_clip_resizes_and_keeps_the_gradient():
    network = ClipResNet(width=8, blocks=(1, 1, 1, 1), outputs=5, side=64).eval()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    found = network(images)
    assert found.shape == (2, 5)
    large = nn.functional.interpolate(images, (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, network(large))
    found.sum().backward()
    assert images.grad.abs().max() > 0


def test_attention_pool_by_its_definition():
    torch.manual_seed(0)
    pool, x = AttentionPool(2, 8, 2, 3).double(), torch.randn(1, 8, 2, 2).double()
    tokens = [x[0, :, i, j] for i in range(2) for j in range(2)]
    tokens = [sum(tokens) / 4, *tokens]
    tokens = [t + pool.positional_embedding[i] for i, t in enumerate(tokens)]
    query, pooled = pool.q_proj(tokens[0]), []
    for head in (slice(0, 4), slice(4, 8)):
        keys = [pool.k_proj(t)[head] for t in tokens]
        weights = torch.stack([query[head] @ k / 2 for k in keys]).softmax(dim=0)
        values = [pool.v_proj(t)[head] for t in tokens]
        pooled.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    torch.testing.assert_close(pool(x)[0], pool.c_proj(torch.cat(pooled)))
