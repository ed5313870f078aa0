import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from Compression import content_picture
from Compression.content import (
    ContentParser,
    Metered,
    describe,
    excluded_classes,
    share_warning,
)
from Model.face_parser import CELEBAMASK_EXCLUDED, CELEBAMASK_NAMES, BiSeNet


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


def faces(own=CELEBAMASK_EXCLUDED):
    return SimpleNamespace(class_names=CELEBAMASK_NAMES, classes_excluded=own)


def included(content):
    excluded = excluded_classes(tuple(content.split(",")), faces())
    return [i for i in range(19) if i not in excluded]


@pytest.mark.parametrize(
    ("content", "classes"),
    [
        ("hair", [17]),
        ("17, skin", [1, 17]),
        ("eyes,lips", [4, 5, 12, 13]),
        ("all,-background,-cloth", [i for i in range(19) if i not in (0, 16)]),
        ("-hair,-hat", [i for i in range(19) if i not in (0, 16, 17, 18)]),
        ("eyes,-l_eye", [5]),
    ],
)
def test_content_is_chosen_by_class(content, classes):
    assert included(content) == classes


def test_without_a_choice_the_content_is_the_parsers_own():
    assert excluded_classes((), faces()) == (0, 16)
    assert describe((0, 16), CELEBAMASK_NAMES) == "all,-background,-cloth"


def test_a_description_means_the_same_content():
    for content in ("hair,eyes", "-nose", "all", "background"):
        excluded = excluded_classes(tuple(content.split(",")), faces())
        again = describe(excluded, CELEBAMASK_NAMES)
        assert excluded_classes(tuple(again.split(",")), faces()) == excluded


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("skn", "skn: the parser has no such class; did you mean skin"),
        ("eye", "did you mean .*eyes"),
        ("19", "19: the parser has no such class; there are background, skin"),
        ("skin,-skin", "skin,-skin: leaves no class"),
        ("skin,", "no such class"),
    ],
)
def test_content_that_is_none(content, said):
    with pytest.raises(ValueError, match=said):
        included(content)


def test_only_another_content_changes_the_protocol(network):
    own = ContentParser(network, identity="face parser 01234567")
    same = ContentParser(network, (16, 0), identity="face parser 01234567")
    hair = ContentParser(network, set(range(19)) - {17}, identity="face parser 01234567")
    assert own.protocol == same.protocol == "the content mask of face parser 01234567"
    assert hair.protocol == f"{own.protocol}, content hair"


def test_soft_masks_are_the_probability_of_the_content(network):
    images = images_of(3)
    common = ContentParser(network).parse(images).flatten().bincount().argsort()[-2:].tolist()
    parser = ContentParser(network, common, chunk=2)
    soft = parser.soft(images)
    with torch.no_grad():
        probabilities = network(network.prepare(images))[0].softmax(1)
    inside = probabilities[:, [c for c in range(19) if c not in common]].sum(1, keepdim=True)
    expected = F.interpolate(inside, (48, 48), mode="bilinear")
    torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-5)
    assert 0.01 < soft.mean() < 0.99
    assert ((soft > 0.5).float() - parser(images)).abs().mean() < 0.2


def test_half_precision_leaves_soft_masks_alone(network, monkeypatch):
    images, logits = images_of(1), torch.randn(1, 19, 32, 32)
    monkeypatch.setattr(network, "classify", lambda part: logits)
    parser = ContentParser(network)
    expected = parser.soft(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(parser.soft(images), expected, rtol=0, atol=0)


def test_a_mask_of_next_to_nothing_is_told(network):
    hair = ContentParser(network, set(range(19)) - {17})
    assert "hold 4.0% of the pixels" in share_warning(0.04, hair)
    assert "hold 96.0% of the pixels" in share_warning(0.96, hair)
    assert not share_warning(0.5, hair)
    assert not share_warning(1.0, ContentParser(network, ()))


def test_the_share_is_that_of_all_masks(network):
    images = images_of(5)
    common = ContentParser(network).parse(images).flatten().bincount().argsort()[-2:].tolist()
    metered = Metered(ContentParser(network, common))
    masks = torch.cat([metered(images[:2]), metered(images[2:])])
    assert metered.share == pytest.approx(masks.mean().item())


def test_the_picture_and_the_table(tmp_path, capsys):
    flags = f"--out {tmp_path}/c.png --n_sample 9 --shown 3 --device cpu --content hair,eyes"
    assert content_picture.main(flags.split()) == 0
    printed = capsys.readouterr()
    rows = dict(re.findall(r"^ *\d+ (\w+) +([\d.]+)%", printed.out, flags=re.MULTILINE))
    assert sum(map(float, rows.values())) == pytest.approx(100, abs=0.1)
    inside = float(re.search(r"the mask +([\d.]+)%  l_eye,r_eye,hair", printed.out).group(1))
    assert inside == pytest.approx(sum(float(rows[k]) for k in ("hair", "l_eye", "r_eye")), abs=1)
    picture = Image.open(tmp_path / "c.png")
    assert picture.width > 3 * 128
    assert len(picture.getcolors(2**24)) > 100


@pytest.mark.parametrize("content", ["", "skn"])
def test_a_wrong_content_is_one_line(tmp_path, capsys, content):
    with contextlib.suppress(SystemExit):
        assert content_picture.main(["--out", f"{tmp_path}/c.png", "--content", content]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--content" in line
    assert not list(tmp_path.iterdir())
