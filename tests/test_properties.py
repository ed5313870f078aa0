"""Properties that hold for all inputs, and readers that survive any bytes (Hypothesis)."""

import contextlib
import io
import pickle
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from PIL import Image

from Compression.pruning import PruneSettings
from Compression.scores import weight_gradient_score
from Compression.selection import kept_count, select_channels
from Compression.surgery import prune_generator
from Dataset.batches import EndlessBatches
from Dataset.label_maps import LabelMapDataset, LabelMapError
from Dataset.pictures import UnreadableImageError, fit_square, read_image
from Evaluation import feature_statistics, sampling
from Evaluation.feature_statistics import Statistics, StatisticsError
from Evaluation.measure import MeasureSettings
from Model import checkpoint
from Model.checkpoint import CheckpointError, load_generator
from Model.generator import Generator
from Model.ops import make_kernel, upfirdn2d
from train_hyperparams import TrainConfig
from Util.cli import OneLineParser
from Util.settings import add_flags, known_settings

QUICK = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SLOW = settings(QUICK, max_examples=15)

WIDTHS = st.lists(st.integers(1, 6), min_size=4, max_size=4)


def generator_of(widths, seed=0):
    torch.manual_seed(seed)
    generator = Generator(8, 4, 2, widths)
    for parameter in generator.parameters():
        parameter.data.normal_()  # also those that start as ones or zeros
    return generator.requires_grad_(False)


def equal(a, b):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)


# Readers


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """The bytes of good files, that Hypothesis damages."""
    folder = tmp_path_factory.mktemp("samples")
    checkpoint.save(folder / "new.pt", {"g_ema": generator_of((2, 2, 2, 2))})
    torch.save(
        {"g_ema": generator_of((2, 2, 2, 2)).state_dict()},
        folder / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    feature_statistics.save(folder / "s.npz", Statistics(np.zeros(3), np.eye(3)))
    (folder / "s.pkl").write_bytes(pickle.dumps({"mean": np.zeros(3), "cov": np.eye(3)}))
    pixels = np.random.default_rng(0).integers(0, 19, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "label.png")
    Image.fromarray(pixels * 12).save(folder / "picture.jpg")
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@st.composite
def damage(draw):
    """A function of bytes: some are changed, cut off, doubled or left out."""
    edits = draw(
        st.lists(
            st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=8)),
            min_size=1,
            max_size=6,
        )
    )

    def apply(data):
        for place, kind, value in edits:
            at = int(place * len(data))
            if kind == 0:
                data = data[:at] + value + data[at + len(value) :]
            elif kind == 1:
                data = data[:at]
            elif kind == 2:
                data = data[:at] + value + data[at:]
            else:
                data = data[:at] + data[at + len(value) :]
        return data

    return apply


def read_or_refuse(read, error, data, suffix):
    """Call a reader on a file of these bytes; anything but its own one-line error is a failure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"file{suffix}"
        file.write_bytes(data)
        try:
            return read(file)
        except error as found:
            refusal = str(found)
    assert "\n" not in refusal
    return None


@settings(QUICK, max_examples=120)
@given(change=damage())
@pytest.mark.parametrize("name", ["new.pt", "old.pt"])
def test_damaged_checkpoints_are_read_or_refused(samples, name, change):
    loaded = read_or_refuse(load_generator, CheckpointError, change(samples[name]), ".pt")
    if loaded is not None:  # bytes that do not matter, or values that are still numbers
        assert loaded.channels == (2, 2, 2, 2)
        assert all(v.isfinite().all() for v in loaded.state_dict().values())


@QUICK
@given(data=st.binary(max_size=200))
def test_any_bytes_are_no_checkpoint_and_no_statistics(data):
    assert read_or_refuse(load_generator, CheckpointError, data, ".pt") is None
    assert read_or_refuse(feature_statistics.load, StatisticsError, data, ".pkl") is None


@settings(QUICK, max_examples=120)
@given(change=damage())
@pytest.mark.parametrize("name", ["s.npz", "s.pkl"])
def test_damaged_statistics_are_read_or_refused(samples, name, change):
    found = read_or_refuse(
        feature_statistics.load, StatisticsError, change(samples[name]), Path(name).suffix
    )
    if found is not None:
        assert found.cov.shape == (len(found.mean), len(found.mean))
        assert np.isfinite(found.cov).all()


@settings(QUICK, max_examples=120)
@given(change=damage())
def test_damaged_pictures_and_label_maps_are_read_or_refused(samples, change):
    label = change(samples["label.png"])
    picture = read_or_refuse(read_image, UnreadableImageError, change(samples["picture.jpg"]), "")
    assert picture is None or picture.mode == "RGB"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "labels").mkdir()
        (folder / "images/0.jpg").write_bytes(samples["picture.jpg"])
        (folder / "labels/0.png").write_bytes(label)
        dataset = LabelMapDataset(folder, 4, 19)
        pair = read_or_refuse(lambda _: dataset[0], LabelMapError, b"", "")
    assert pair is None or pair[1].shape == (4, 4)
    assert pair is None or 0 <= pair[1].min() <= pair[1].max() < 19


@QUICK
@given(
    size=st.integers(1, 40),
    values=st.lists(st.integers(0, 255), min_size=1, max_size=64),
    n_classes=st.integers(1, 256),
)
def test_a_label_map_is_read_exactly_or_names_its_class(size, values, n_classes):
    labels = np.resize(np.array(values, np.uint8), (size, size))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("images", "labels"):
            (folder / place).mkdir()
            Image.fromarray(labels).save(folder / place / "0.png")
        dataset = LabelMapDataset(folder, size, n_classes)
        if labels.max() >= n_classes:
            with pytest.raises(LabelMapError, match=f"has class {labels.max()}"):
                dataset[0]
        else:
            np.testing.assert_array_equal(dataset[0][1].numpy(), labels)


@QUICK
@given(
    width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 64),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "HSV"]),
)  # fmt: skip
def test_every_picture_becomes_a_square_of_colours(width, height, size, mode):
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "TIFF") if mode != "HSV" else Image.new(
        "RGB", (width, height)
    ).save(buffer, "PNG")
    buffer.seek(0)
    square = fit_square(read_image(buffer), size)
    assert (square.mode, square.size) == ("RGB", (size, size))


# Saving and loading


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=9)
    | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@QUICK
@given(content=st.dictionaries(st.text(max_size=8), PLAIN, max_size=4))
def test_saving_and_loading_plain_values_is_the_identity(content):
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "x.pt", content)
        assert checkpoint.read(Path(folder) / "x.pt") == content


@SLOW
@given(widths=WIDTHS, seed=st.integers(0, 99))
def test_saving_and_loading_a_generator_is_the_identity(widths, seed):
    generator = generator_of(widths, seed)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.pt"
        checkpoint.save(file, {"g_ema": generator})
        equal(load_generator(file), generator)
        first = file.read_bytes()
        checkpoint.save(file, {"g_ema": load_generator(file)})
        assert file.read_bytes() == first


@QUICK
@given(d=st.integers(1, 9), seed=st.integers(0, 99), note=st.text(max_size=9))
def test_saving_and_loading_statistics_is_the_identity(d, seed, note):
    features = np.random.default_rng(seed).standard_normal((d + 3, d)).astype(np.float32)
    made = feature_statistics.statistics_of(features, {"note": note}, keep_features=True)
    with tempfile.TemporaryDirectory() as folder:
        feature_statistics.save(Path(folder) / "s.npz", made)
        found = feature_statistics.load(Path(folder) / "s.npz")
    for name in ("mean", "cov", "features"):
        np.testing.assert_array_equal(getattr(found, name), getattr(made, name))
    assert found.record == made.record


# Pruning


@st.composite
def masks(draw, widths):
    keep = []
    for width in widths:
        mask = draw(st.lists(st.booleans(), min_size=width, max_size=width))
        if not any(mask):
            mask[draw(st.integers(0, width - 1))] = True
        keep.append(torch.tensor(mask))
    return keep


@SLOW
@given(data=st.data(), widths=WIDTHS)
def test_pruning_twice_is_pruning_by_the_composed_masks(data, widths):
    generator = generator_of(widths)
    first = data.draw(masks(widths))
    second = data.draw(masks([int(m.sum()) for m in first]))
    composed = []
    for a, b in zip(first, second, strict=True):
        both = a.clone()
        both[a] = b
        composed.append(both)
    twice = prune_generator(prune_generator(generator, first), second)
    equal(twice, prune_generator(generator, composed))


@SLOW
@given(data=st.data(), widths=WIDTHS)
def test_surgery_moves_values_and_never_changes_them(data, widths):
    """Every kept tensor is the full one's at the kept indices, along each of its channel axes."""
    generator = generator_of(widths)
    keep = data.draw(masks(widths))
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    pruned = prune_generator(generator, keep).state_dict()
    expected = dict(before)
    expected["input.input"] = before["input.input"][:, keep[0]]
    for i, layer in enumerate(["conv1", "convs.0", "convs.1"]):
        weight = before[f"{layer}.conv.weight"]
        expected[f"{layer}.conv.weight"] = weight[:, keep[i + 1]][:, :, keep[i]]
        for part in ("weight", "bias"):
            name = f"{layer}.conv.modulation.{part}"
            expected[name] = before[name][keep[i]]
        expected[f"{layer}.activate.bias"] = before[f"{layer}.activate.bias"][keep[i + 1]]
    for layer, mask in (("to_rgb1", keep[1]), ("to_rgbs.0", keep[3])):
        expected[f"{layer}.conv.weight"] = before[f"{layer}.conv.weight"][:, :, mask]
        for part in ("weight", "bias"):
            name = f"{layer}.conv.modulation.{part}"
            expected[name] = before[name][mask]
    torch.testing.assert_close(dict(pruned), expected, rtol=0, atol=0)
    torch.testing.assert_close(dict(generator.state_dict()), before, rtol=0, atol=0)


@QUICK
@given(
    scores=st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), min_size=1, max_size=5
    ),
    ratio=st.floats(0, 1, exclude_max=True),
)
def test_selection_keeps_the_highest_and_at_least_one(scores, ratio):
    groups = [torch.tensor(values) for values in scores]
    for group, keep in zip(groups, select_channels(groups, ratio), strict=True):
        assert keep.sum() == kept_count(len(group), ratio) >= 1
        if not keep.all():
            assert group[keep].min() >= group[~keep].max()


@SLOW
@given(order=st.permutations(range(5)), widths=WIDTHS)
def test_scores_do_not_depend_on_the_order_within_a_batch(order, widths):
    generator = generator_of(widths).requires_grad_(True)
    torch.manual_seed(1)
    z, target = torch.randn(5, 4), torch.randn(5, 3, 8, 8)

    def scores(indices):
        images = generator([z[indices]], randomize_noise=False)
        return weight_gradient_score(generator, images, target[indices])

    for a, b in zip(scores(list(range(5))), scores(list(order)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# Shapes


@SLOW
@given(
    log2=st.integers(3, 6), n=st.integers(1, 3), style_dim=st.integers(1, 6), data=st.data(),
    noise=st.sampled_from([None, "fixed"]),
)  # fmt: skip
def test_a_generator_of_any_widths_makes_its_shapes(log2, n, style_dim, data, noise):
    n_latent = 2 * log2 - 2
    widths = data.draw(st.lists(st.integers(1, 5), min_size=n_latent, max_size=n_latent))
    generator = Generator(2**log2, style_dim, 1, widths).requires_grad_(False)
    assert generator.channels == tuple(widths)
    assert load_generator({"g_ema": generator.state_dict()}).channels == tuple(widths)
    w_plus = torch.randn(n, n_latent, style_dim)
    made = generator.synthesis(w_plus, noise, features=True)
    assert [tuple(x.shape) for x in made.rgbs] == [(n, 3, 2**i, 2**i) for i in range(2, log2 + 1)]
    sides = [2 ** (2 + (i + 1) // 2) for i in range(n_latent - 1)]
    shapes = [(n, width, side, side) for width, side in zip(widths[1:], sides, strict=True)]
    assert [tuple(x.shape) for x in made.features] == shapes


@QUICK
@given(size=st.integers(-5, 2000), count=st.integers(0, 20))
def test_a_generator_of_impossible_sizes_is_a_value_error(size, count):
    possible = size in (8, 16, 32, 64, 128, 256, 512, 1024)
    if possible and count == 2 * (size.bit_length() - 1) - 2:
        return
    with pytest.raises(ValueError, match=r"power of two|positive channel counts"):
        Generator(size, 1, 1, (1,) * count or (1,))


@QUICK
@given(
    height=st.integers(1, 9), width=st.integers(1, 9), up=st.integers(1, 3), down=st.integers(1, 3),
    before=st.integers(-2, 4), after=st.integers(-2, 4), taps=st.integers(1, 5),
)  # fmt: skip
def test_upfirdn2d_is_its_definition(height, width, up, down, before, after, taps):
    """Zero insertion, padding or cropping, convolution, decimation; shapes as documented."""
    shape = [(n * up + before + after - taps) // down + 1 for n in (height, width)]
    if min(n * up + before + after - taps for n in (height, width)) < 0:
        return
    torch.manual_seed(0)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    kernel = torch.rand(taps, taps, dtype=torch.float64)
    zeros = x.new_zeros(2, 3, height * up, width * up)
    zeros[:, :, ::up, ::up] = x
    padded = F.pad(zeros, (before, after, before, after))
    weight = kernel.flip((0, 1)).expand(3, 1, taps, taps)
    expected = F.conv2d(padded, weight, groups=3)[:, :, ::down, ::down]
    found = upfirdn2d(x, kernel, up, down, (before, after), impl="reference")
    assert list(found.shape[2:]) == shape
    torch.testing.assert_close(found, expected)


@QUICK
@given(taps=st.lists(st.floats(0.125, 9, width=32), min_size=1, max_size=6), gain=st.floats(0.5, 8))
def test_kernels_sum_to_their_gain(taps, gain):
    assert make_kernel(taps, gain).sum().item() == pytest.approx(gain, rel=1e-4)


@QUICK
@given(
    length=st.integers(1, 30), batch=st.integers(1, 8), world=st.integers(1, 4),
    start=st.integers(0, 90), seed=st.integers(0, 9),
)  # fmt: skip
def test_the_processes_together_see_the_stream_of_one(length, batch, world, start, seed):
    size = batch * world
    whole = next(iter(EndlessBatches(length, size, seed, start)))
    parts = [
        next(iter(EndlessBatches(length, size, seed, start, True, rank, world)))
        for rank in range(world)
    ]
    assert [parts[i % world][i // world] for i in range(size)] == whole


@QUICK
@given(n=st.integers(1, 60), size=st.integers(1, 9), world=st.integers(1, 4))
def test_the_shares_of_sampling_are_all_images_once(n, size, world):
    shares = [i for r in range(world) for part in sampling.shares(n, size, r, world) for i in part]
    assert sorted(shares) == list(range(n))


# Command lines


def flags_of(parser):
    return sorted(o for action in parser._actions for o in action.option_strings if len(o) > 2)


WORDS = st.sampled_from(
    ["", "0", "1", "-1", "1e9", "nan", "inf", "x", "a,b", "1,2", "True", "/", "..", "--", "\x00"]
) | st.text(max_size=6)


@settings(QUICK, max_examples=150)
@given(data=st.data())
@pytest.mark.parametrize("kind", [PruneSettings, MeasureSettings, TrainConfig])
def test_any_command_line_is_parsed_or_refused_in_one_line(kind, data):
    parser = OneLineParser(prog="script")
    add_flags(parser, kind)
    known = st.sampled_from([f for f in flags_of(parser) if f != "--help"])
    argv = data.draw(st.lists(known | WORDS, max_size=6))
    said, code = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            parser.parse_args([word for word in argv if word != "-h"])
        except SystemExit as error:
            code = error.code
    assert code in (None, 0, 2)
    assert len(said.getvalue().splitlines()) == (code == 2)


@QUICK
@given(
    saved=st.dictionaries(
        st.sampled_from(sorted(TrainConfig.__dataclass_fields__)) | st.text(max_size=4),
        PLAIN | st.lists(st.integers(), max_size=3),
        max_size=6,
    )
)
def test_any_stored_settings_are_taken_or_named(saved):
    try:
        config, refusal = TrainConfig(**known_settings(saved, TrainConfig)), ""
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert any(key in refusal for key in saved)
    else:
        for key in saved.keys() & TrainConfig.__dataclass_fields__.keys():
            kind = type(TrainConfig.__dataclass_fields__[key].default)
            assert type(getattr(config, key)) in ((float, int) if kind is float else (kind,))
