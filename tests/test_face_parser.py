import pytest
import torch

from Compression.content import ContentParser
from Model import checkpoint
from Model.face_parser import BasicBlock, BiSeNet, fold_batch_norm
from tests.golden_fill import assert_golden, fill_from_numpy, load_golden


@pytest.fixture(scope="module", params=["as it is", "batch norm folded"])
def golden(request):
    arrays, spec = load_golden("parser")
    network = BiSeNet(spec["n_classes"])
    fill_from_numpy(network, spec["seed"], parser=True)
    if request.param == "batch norm folded":
        network = fold_batch_norm(network)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())
    return ContentParser(network), arrays


def test_golden_logits(golden):
    parser, arrays = golden
    images = parser.network.prepare(torch.from_numpy(arrays["images"]))
    with torch.no_grad():
        logits = parser.network(images)[0]
    assert_golden(logits[:, :, ::32, ::32], arrays, "logits_16x16")


def test_golden_parsing(golden):
    parser, arrays = golden
    parsing = parser.parse(torch.from_numpy(arrays["images"]))
    expected = torch.from_numpy(arrays["parsing"]).long()
    assert parsing.shape == expected.shape
    assert parsing.dtype == torch.int64
    # Where two classes tie, the order of float additions decides; they differ between processors.
    assert (parsing != expected).float().mean() < 1e-4


def test_golden_masked_images(golden):
    parser, arrays = golden
    images = torch.from_numpy(arrays["images"])
    masked = images * parser(images)
    differs = (masked - torch.from_numpy(arrays["masked_images"])).abs().amax(1) > 1e-6
    assert differs.float().mean() < 1e-3


def test_published_names_and_sizes():
    state = BiSeNet().state_dict()
    shapes = {
        "cp.resnet.conv1.weight": (64, 3, 7, 7),
        "cp.resnet.layer4.0.downsample.1.running_var": (512,),
        "cp.arm16.bn_atten.weight": (128,),
        "cp.conv_avg.conv.weight": (128, 512, 1, 1),
        "ffm.convblk.conv.weight": (256, 256, 1, 1),
        "ffm.conv1.weight": (64, 256, 1, 1),
        "conv_out.conv.conv.weight": (256, 256, 3, 3),
        "conv_out16.conv.conv.weight": (64, 128, 3, 3),
        "conv_out32.conv_out.weight": (19, 64, 1, 1),
    }
    for name, shape in shapes.items():
        assert tuple(state[name].shape) == shape


@pytest.mark.parametrize(("stem_stride", "side"), [(4, 8), (2, 16), (1, 32)])
def test_stem_stride_sets_the_logits_side(stem_stride, side):
    network = BiSeNet(5, width=2, stem_stride=stem_stride, input_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    assert network.main_logits(images).shape == (1, 5, side, side)
    outputs = network(images)
    assert [tuple(output.shape) for output in outputs] == [(1, 5, 64, 64)] * 3
    main = network.upsample(network.main_logits(images), images.shape[2:])
    torch.testing.assert_close(main, outputs[0])


def test_small_stem_strides_enlarge_evenly():
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    even = BiSeNet(1, width=1, stem_stride=2).upsample(ramp, (16, 16))[0, 0, 0]
    torch.testing.assert_close(even[2:14], (torch.arange(2, 14) + 0.5) / 4 - 0.5)
    published = BiSeNet(1, width=1).upsample(ramp, (16, 16))[0, 0, 0]
    torch.testing.assert_close(published, torch.linspace(0, 3, 16))


def test_odd_sizes_are_parsed():
    network = BiSeNet(3, width=2).eval()
    assert network(torch.randn(1, 3, 75, 100))[0].shape == (1, 3, 75, 100)


def test_trunk_features_let_gradients_through():
    network = BiSeNet(3, width=4).eval()
    images = torch.randn(1, 3, 64, 64, requires_grad=True)
    features = network.trunk_features(images)
    assert [tuple(f.shape) for f in features] == [(1, 8, 8, 8), (1, 16, 4, 4), (1, 32, 2, 2)]
    sum(f.sum() for f in features).backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [4, 8, 12])
def test_narrow_shortcut_gradients_in_channels_last(channels):
    # With a strided 1x1 layer this crashes or damages memory (oneDNN issue 6035).
    block = BasicBlock(channels, 2 * channels, stride=2).eval()
    x = torch.randn(4, channels, 64, 64)
    gradients = []
    for kind, order in ((torch.float32, torch.channels_last), (torch.float64, None)):
        block = block.to(kind)
        given = x.to(kind).contiguous(memory_format=order or torch.contiguous_format)
        weights = list(block.parameters())
        gradients.append(torch.autograd.grad(block(given).square().sum(), weights))
    for narrow, exact in zip(*gradients, strict=True):
        tolerance = 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(narrow.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("bare", [True, False])
def test_checkpoint_round_trip(tmp_path, bare):
    network = BiSeNet(4, width=3, stem_stride=4 if bare else 2, input_size=512 if bare else 96)
    content = network.state_dict() if bare else {"parser": network, "config": network.config}
    checkpoint.save(tmp_path / "parser.pt", content)
    loaded = checkpoint.load_face_parser(tmp_path / "parser.pt")
    assert loaded.config == network.config
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [{"n_classes": 0}, {"width": 0}, {"stem_stride": 3}])
def test_impossible_sizes(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BiSeNet(**wrong)
