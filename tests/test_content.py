import pytest
import torch
import torch.nn.functional as F

from Compression.content import ContentParser
from Model.face_parser import BiSeNet


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = BiSeNet(19, width=4, stem_stride=2, input_size=96)
    images = torch.randn(4, 3, 96, 96)
    network.train()(images)  # running statistics, so that classes vary over the picture
    return network


def images_of(count, side=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 2.4 - 1.2
    return F.interpolate(coarse, (side, side), mode="bilinear")


def plain_mask(network, images, excluded):
    """The mask by its definition, one image at a time."""
    network.eval()
    mean = torch.tensor((0.485, 0.456, 0.406)).view(1, 3, 1, 1)
    std = torch.tensor((0.229, 0.224, 0.225)).view(1, 3, 1, 1)
    masks, parsings = [], []
    for image in images:
        shown = ((image[None] + 1) / 2).clamp(0, 1)
        shown = F.interpolate(shown, (96, 96), mode="bilinear", align_corners=False)
        with torch.no_grad():
            parsing = network((shown - mean) / std)[0].argmax(1)
        content = torch.ones(parsing.shape)
        for c in excluded:
            content[parsing == c] = 0
        size = image.shape[1:]
        masks.append(F.interpolate(content[None], size, mode="bilinear") > 0.5)
        parsings.append(parsing)
    return torch.cat(masks).float(), torch.cat(parsings)


def test_mask_follows_the_definition(network):
    images = images_of(3)
    common = ContentParser(network).parse(images).flatten().bincount().argsort()[-2:].tolist()
    mask, parsing = plain_mask(network, images, common)
    parser = ContentParser(network, classes_excluded=common)
    assert 0.05 < mask.mean() < 0.95
    assert (parser.parse(images) != parsing).float().mean() < 1e-3
    assert (parser(images) != mask).float().mean() < 1e-3


def test_one_image(network):
    images = images_of(3)
    parser = ContentParser(network)
    mask = parser(images[:1])
    assert mask.shape == (1, 1, 48, 48)
    assert mask.dtype == torch.float32
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    assert (mask != parser(images)[:1]).float().mean() < 1e-3


def test_chunks_equal_one_batch(network):
    images = images_of(5)
    whole, parts = ContentParser(network, chunk=8), ContentParser(network, chunk=2)
    assert parts.parse(images).shape == (5, 96, 96)
    assert (whole.parse(images) != parts.parse(images)).float().mean() < 1e-3
    assert (whole(images) != parts(images)).float().mean() < 1e-3


def test_no_gradients_and_always_eval(network):
    images = images_of(2).requires_grad_()
    parser = ContentParser(network).train()
    before = network.cp.resnet.bn1.running_mean.clone()
    mask = parser(images)
    assert not mask.requires_grad
    torch.testing.assert_close(network.cp.resnet.bn1.running_mean, before, rtol=0, atol=0)
    (mask * images).sum().backward()  # a mask made under inference mode could not be used here
    torch.testing.assert_close(images.grad, mask.expand_as(images))


def test_network_input_is_differentiable(network):
    images = (images_of(1) / 2).requires_grad_()
    network.prepare(images).sum().backward()
    assert (images.grad > 0).all()


def test_values_out_of_range_count_as_the_nearest(network):
    parser = ContentParser(network)
    images = images_of(1)
    torch.testing.assert_close(
        parser.network.prepare(images), parser.network.prepare(images.clip(-1, 1))
    )


def test_excluding_nothing_or_everything(network):
    images = images_of(2, side=96)
    assert ContentParser(network, ())(images).min() == 1
    assert ContentParser(network, range(19))(images).max() == 0


def test_errors(network):
    with pytest.raises(ValueError, match=r"classes_excluded has \[19\]"):
        ContentParser(network, (0, 19))
    with pytest.raises(ValueError, match="chunk is 0"):
        ContentParser(network, chunk=0)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\)"):
        ContentParser(network)(torch.zeros(3, 48, 48))
