import pytest
import torch
import torchvision

from Evaluation.distances import LPIPS_TRUNKS, Lpips, ParserDistance, load_distance, load_lpips
from Model.checkpoint import CheckpointError
from Model.face_parser import BiSeNet
from Util.settings import SettingError


def images():
    return torch.rand(2, 2, 3, 32, 32).mul(2).sub(1).unbind(0)


def parser_distance():
    return ParserDistance(BiSeNet(width=4, stem_stride=2, input_size=32))


def test_parser_distance_is_a_differentiable_distance():
    distance = parser_distance()
    a, b = images()
    torch.testing.assert_close(distance(a, a), torch.zeros(2))
    torch.testing.assert_close(distance(a, b), distance(b, a))
    assert (distance(a, b) > 0).all()
    a.requires_grad_()
    distance(a, b).sum().backward()
    assert a.grad.abs().max() > 0
    assert all(p.grad is None for p in distance.parameters())


def test_parser_distance_of_a_pair_ignores_the_batch():
    distance = parser_distance()
    a, b = images()
    torch.testing.assert_close(distance(a, b)[:1], distance(a[:1], b[:1]))


def test_a_distance_names_the_setting_of_its_file(tmp_path):
    cpu, none = torch.device("cpu"), tmp_path / "none"
    for name, setting in (("parser", "parser_ckpt"), ("squeeze", "perceptual_ckpt")):
        with pytest.raises(SettingError, match=f"{setting} .*none: no such file"):
            load_distance(name, none, lambda: none, cpu)


def test_lpips_trunk_comes_from_a_torchvision_file(tmp_path):
    # The smallest of the three; the mapping of names is the same for all.
    network = getattr(torchvision.models, LPIPS_TRUNKS["squeeze"])(weights=None)
    torch.save(network.state_dict(), tmp_path / "squeeze.pth")
    lpips = load_lpips("squeeze", tmp_path / "squeeze.pth")
    weight = network.state_dict()["features.3.squeeze.weight"]
    torch.testing.assert_close(lpips.state_dict()["net.slice2.3.squeeze.weight"], weight)
    a, b = images()
    assert lpips(a, a).abs().max() < 1e-6
    assert (lpips(a, b) > 0).all()
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match="expected torchvision's squeezenet1_1"):
        load_lpips("squeeze", tmp_path / "wrong.pth")


@pytest.mark.parametrize("name", list(LPIPS_TRUNKS))
def test_every_lpips_trunk_maps_onto_torchvision(name):
    lpips = pytest.importorskip("lpips")
    with torch.device("meta"):
        source = getattr(torchvision.models, LPIPS_TRUNKS[name])(weights=None).state_dict()
        net = lpips.LPIPS(net=name, pnet_rand=True, pretrained=False, verbose=False).net
    for key, value in net.state_dict().items():
        assert source["features." + key.split(".", 1)[1]].shape == value.shape


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    pytest.importorskip("lpips")

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CheckpointError) as error:
        load_lpips("vgg")
    for part in (
        f"{tmp_path}/checkpoints/vgg16-397923af.pth is missing and could not be downloaded",
        "(no network); put https://download.pytorch.org/models/vgg16-397923af.pth there",
        "name torchvision's vgg16 file by the setting perceptual_ckpt, or take perceptual parser",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize("name", list(LPIPS_TRUNKS))
def test_lpips_equals_that_of_the_package(name):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    package = lpips.LPIPS(net=name, pnet_rand=True, verbose=False).double()
    package.eval().requires_grad_(False)
    a, b = torch.rand(2, 2, 3, 64, 64, dtype=torch.float64).mul(2).sub(1).unbind()
    results = []
    for network in (package, Lpips(package)):
        pair = [image.clone().requires_grad_() for image in (a, b)]
        found = network(*pair)
        weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
        results.append([found, *torch.autograd.grad((found.flatten() * weights).sum(), pair)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=0.0)
