"""Checkpoints, statistics, latents, runs, images and data sets as strangers might send them."""

import shutil

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

import get_edited_image
import get_fid
import get_generated_image
import get_ppl
import get_projected_image
import prune
import train
import train_parser
from Dataset import DatasetError
from Dataset.images import Images
from Dataset.label_maps import LabelMapDataset, LabelMapError
from Dataset.pictures import UnreadableImageError, read_image
from Dataset.prepare_data import PrepareSettings, prepare
from Evaluation import feature_statistics
from Evaluation.feature_statistics import StatisticsError
from Evaluation.projection import load_projection
from Model import checkpoint
from Model.checkpoint import CheckpointError, load_discriminator, load_face_parser, load_generator
from tests.hostile import CHANNELS, KINDS, make_files
from Util.settings import SettingError

TRAIN = "--path {0}/data --iter 1 --batch_size 2 --workers 0 --device cpu --out {0}/new"
STUDENT = f"{TRAIN} --ckpt {{0}}/model.pt --perceptual parser --parser_ckpt {{0}}/parser.pt"
MODEL = "--device cpu --ckpt {0}/model.pt"
READERS = {
    "prune --ckpt": (prune, "--device cpu --out {0}/new --ckpt"),
    "prune --parser_ckpt": (prune, MODEL + " --out {0}/new --parser_ckpt"),
    "train --ckpt": (train, f"{TRAIN} --ckpt"),
    "train --teacher_ckpt": (train, f"{STUDENT} --teacher_ckpt"),
    "train --parser_ckpt": (train, f"{STUDENT} --teacher_ckpt {{0}}/model.pt --parser_ckpt"),
    "train --perceptual_ckpt": (
        train,
        f"{STUDENT} --teacher_ckpt {{0}}/model.pt --perceptual squeeze --perceptual_ckpt",
    ),
    "train --inception_ckpt": (train, f"{STUDENT} --fid_n_sample 9 --inception_ckpt"),
    "train --fid_stats": (
        train,
        f"{STUDENT} --fid_n_sample 999 --fid_features parser --fid_stats",
    ),
    "train --resume": (train, "--iter 9 --resume"),
    "train_parser --eval_only": (
        train_parser,
        "--path {0}/pairs --device cpu --workers 0 --eval_only",
    ),
    "get_fid --ckpt": (get_fid, "--device cpu --ckpt"),
    "get_fid --parser_ckpt": (get_fid, MODEL + " --features parser --parser_ckpt"),
    "get_fid --inception_ckpt": (get_fid, MODEL + " --features inception --inception_ckpt"),
    "get_fid --stats": (
        get_fid,
        MODEL + " --features parser --parser_ckpt {0}/parser.pt --stats",
    ),
    "get_ppl --ckpt": (get_ppl, "--device cpu --ckpt"),
    "get_ppl --perceptual_ckpt": (get_ppl, MODEL + " --perceptual squeeze --perceptual_ckpt"),
    "get_generated_image --ckpt": (get_generated_image, "--device cpu --out {0}/new --ckpt"),
    "get_edited_image --ckpt": (get_edited_image, "--device cpu --out {0}/new --ckpt"),
    "get_edited_image --projection_a": (
        get_edited_image,
        MODEL + " --parser_ckpt {0}/parser.pt --out {0}/new --projection_a",
    ),
    "get_projected_image --ckpt": (get_projected_image, "--device cpu --out {0}/new --ckpt"),
    "get_projected_image --parser_ckpt": (
        get_projected_image,
        MODEL + " --out {0}/new --parser_ckpt",
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    make_files(folder)
    (folder / "bad").mkdir()
    for kind, write in KINDS.items():
        write(folder / "bad" / f"{kind}.file")
    assert (folder / "bad/bomb.file").stat().st_size < 2**21
    return folder


def refused(capsys, main, argv):
    """The one line that a script refuses its input with."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 2
    (line,) = captured.err.splitlines()
    return line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_runs_or_chokes_on_it(files, tmp_path, capsys, monkeypatch, reader, kind):
    monkeypatch.chdir(tmp_path)
    script, flags = READERS[reader]
    file = files / "bad" / f"{kind}.file"
    if "--resume" in flags:
        shutil.copytree(files / "run", tmp_path / "run")
        (tmp_path / "run/checkpoints/000001.pt").unlink()
        file = shutil.copy(file, tmp_path / "run/checkpoints/000002.pt")
    line = refused(capsys, script.main, [*flags.format(files).split(), str(file)])
    assert str(file) in line
    assert "error: " in line
    if kind in ("pickle", "torch", "old_torch"):
        assert "mkdir" in line or "stats" in reader or "projection" in reader
    assert not (tmp_path / "attacked").exists()
    assert not (files / "new").exists()


def test_malicious_statistics_name_the_code(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StatisticsError, match=r"refused, it would run posix\.mkdir"):
        feature_statistics.load(files / "bad/pickle.file")
    for kind in ("bomb", "lie"):
        with pytest.raises(StatisticsError, match="would unpack to more than"):
            feature_statistics.load(files / f"bad/{kind}.file")
        with pytest.raises(CheckpointError, match="would unpack to more than its size"):
            checkpoint.read(files / f"bad/{kind}.file")
    assert not (tmp_path / "attacked").exists()


LOADERS = (
    (load_generator, "g_ema", "model.pt"),
    (load_discriminator, "d", "model.pt"),
    (load_face_parser, "parser", "parser.pt"),
)


@pytest.mark.parametrize(("load", "key", "name"), LOADERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(files, load, key, name, dtype):
    content = checkpoint.read(files / name)
    plain = load(content).state_dict()
    content[key] = {k: v.to(dtype) if v.is_floating_point() else v for k, v in content[key].items()}
    for k, v in load(content).state_dict().items():
        assert v.dtype == plain[k].dtype
        torch.testing.assert_close(v, content[key][k].to(v.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("load", "key", "name"), LOADERS)
def test_the_prefix_of_data_parallel_is_accepted(files, load, key, name):
    content = checkpoint.read(files / name)
    plain = load(content).state_dict()
    content[key] = {f"module.{k}": v for k, v in content[key].items()}
    torch.testing.assert_close(load(content).state_dict(), plain, rtol=0, atol=0)


def with_value(value):
    def change(state):
        state["conv1.activate.bias"] = torch.zeros(5)
        state["conv1.activate.bias"][2] = value

    return change


BIG = torch.zeros(1).expand(2**40)  # two bytes stand for terabytes
CHANGES = {
    "nan": (with_value(torch.nan), r"conv1\.activate\.bias holds NaN or infinite"),
    "inf": (with_value(-torch.inf), r"conv1\.activate\.bias holds NaN or infinite"),
    "too large for float32": (
        lambda s: s.update({"conv1.activate.bias": torch.full((5,), 1e300, dtype=torch.float64)}),
        r"conv1\.activate\.bias holds NaN or infinite",
    ),
    "integers": (
        lambda s: s.update({"conv1.activate.bias": torch.zeros(5, dtype=torch.int64)}),
        r"conv1\.activate\.bias is torch\.int64, expected torch\.float32",
    ),
    "complex": (
        lambda s: s.update({"conv1.activate.bias": torch.zeros(5, dtype=torch.complex64)}),
        r"conv1\.activate\.bias is torch\.complex64",
    ),
    "sparse": (
        lambda s: s.update({"conv1.activate.bias": torch.zeros(5).to_sparse()}),
        r"conv1\.activate\.bias is no tensor",
    ),
    "without values": (
        lambda s: s.update({"conv1.activate.bias": torch.zeros(5, device="meta")}),
        r"conv1\.activate\.bias is no tensor",
    ),
    "repeated values": (
        lambda s: s.update({"input.input": BIG.view(1, -1, 4, 4)}),
        "claim more values than are stored",
    ),
    "one storage many times": (
        lambda s: s.update({f"x{i}": s["conv1.conv.weight"] for i in range(3)}),
        "claim more values than are stored",
    ),
    "no values": (
        lambda s: s.update({"input.input": torch.zeros(1, 0, 4, 4)}),
        "positive channel counts",
    ),
    "a wide layer": (
        lambda s: s.update({"input.input": torch.zeros(1, 10**5, 4, 4)}),
        r"conv1\.conv\.weight has shape .*, expected \(1, 5, 100000, 3, 3\)",
    ),
    "a huge image": (
        lambda s: s.update(
            {f"convs.{i}.conv.weight": torch.ones(1, 1, 1, 3, 3) for i in range(60)}
        ),
        "claims images of 4294967296 px",
    ),
    "an unknown key": (lambda s: s.update(extra=torch.zeros(1)), "unexpected tensor extra"),
    "a number as key": (lambda s: s.update({3: torch.zeros(1)}), "unexpected tensor 3"),
    "a mapping without styles": (
        lambda s: s.update({"style.1.weight": torch.zeros(0, 0)}),
        "g_ema",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_unfit_tensors_are_named(files, tmp_path, what):
    change, message = CHANGES[what]
    content = checkpoint.read(files / "model.pt")
    change(content["g_ema"])
    file = tmp_path / "changed.pt"
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message) as error:
        load_generator(file)
    assert str(error.value).startswith(f"{file}")
    assert "\n" not in str(error.value)


def test_unknown_entries_beside_the_networks_are_ignored(files):
    content = checkpoint.read(files / "model.pt")
    content |= {"latent_avg": torch.full((8,), torch.nan), "notes": ["x"], 7: None}
    assert load_generator(content).channels == CHANNELS


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (3, "config does not fit"),
        ({"input_size": 10**9}, "config does not fit"),
        ({"input_size": "x"}, "config does not fit"),
        ({"input_size": 0}, "config does not fit"),
        ({"depth": 1}, "unexpected keyword"),
        ({"classes_excluded": 3}, "not iterable"),
        ({"classes_excluded": [19]}, "no class 19 to exclude in 0 to 18"),
        ({"classes_excluded": ["x"]}, "no class 'x' to exclude"),
        ({"classes_excluded": [1.0]}, r"no class 1\.0 to exclude"),
        ({"class_names": ["a"]}, "are not 19 printable names"),
        ({"class_names": ["\x1b[2J"] * 19}, "are not 19 printable names"),
        ({"class_names": [0] * 19}, "are not 19 printable names"),
    ],
)
def test_a_parsers_config_is_checked(files, config, message):
    content = checkpoint.read(files / "parser.pt") | {"config": config}
    with pytest.raises(CheckpointError, match=message):
        load_face_parser(content)


def arrays_of(files, name):
    with np.load(files / name) as file:
        return dict(file)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mean": np.full(3, np.nan)}, "NaN or infinite"),
        ({"cov": np.full((3, 3), np.inf)}, "NaN or infinite"),
        ({"mean": np.zeros(4)}, "do not fit"),
        ({"mean": np.zeros((3, 1))}, "do not fit"),
        ({"cov": np.eye(3) * -1}, "is no covariance"),
        ({"cov": np.triu(np.ones((3, 3)))}, "is no covariance"),
        ({"mean": np.array(["a", "b", "c"])}, "no statistics"),
        ({"cov": np.zeros((3, 3), dtype="V8")}, "no statistics"),
        ({"features": np.zeros((9, 4))}, "do not fit"),
        ({"features": np.full((9, 3), np.nan)}, "NaN or infinite"),
        ({"record": np.array("[1]")}, "record is no JSON object"),
        ({"record": np.array("[" * 10**5)}, "no statistics"),
    ],
)
def test_unfit_statistics_are_named(files, tmp_path, changed, message):
    file = tmp_path / "s.npz"
    np.savez(file, **(arrays_of(files, "stats.npz") | changed))
    with pytest.raises(StatisticsError, match=message) as error:
        feature_statistics.load(file)
    assert str(file) in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_statistics_of_other_precision_are_converted(files, tmp_path, dtype):
    np.savez(tmp_path / "s.npz", mean=np.ones(2, dtype), cov=np.eye(2, dtype=dtype))
    assert feature_statistics.load(tmp_path / "s.npz").mean.dtype == np.float64


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"w_plus": np.full((1, 4, 8), np.nan, np.float32)}, "damaged"),
        ({"w_plus": np.zeros((1, 4, 9), np.float32)}, "damaged"),
        ({"w_plus": np.zeros((1, 4, 8), np.int64)}, "damaged"),
        ({"w_plus": np.zeros(4, np.float32)}, "no projection"),
        ({"noise_1": np.zeros((1, 1, 3, 3), np.float32)}, "damaged"),
        ({"noise_1": np.array("x")}, "no projection"),
        ({"fingerprint": np.array("0")}, "made with other weights"),
    ],
)
def test_unfit_latents_are_named(files, tmp_path, changed, message):
    file = tmp_path / "p.npz"
    np.savez(file, **(arrays_of(files, "latents.npz") | changed))
    generator = load_generator(files / "model.pt")
    assert len(load_projection(files / "latents.npz", generator).w_plus) == 1
    with pytest.raises(ValueError, match=message) as error:
        load_projection(file, generator)
    assert str(file) in str(error.value)


def spoiled(content, path, value):
    *way, last = path
    for key in way:
        content = content[key]
    content[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["train_state"], 3),
        (["train_state", "iteration"], "x"),
        (["train_state", "iteration"], 1.5),
        (["train_state", "mean_path_length"], None),
        (["train_state", "averages"], {"d_loss": "x"}),
        (["train_state", "rng"], [{"cpu": torch.zeros(3, dtype=torch.uint8)}]),
        (["train_state", "rng"], [{}]),
        (["g_optim"], []),
        (["g_optim", "param_groups"], []),
        (["g_optim", "state", 0], {"exp_avg": 3}),
        (["g_optim", "state", 0, "exp_avg"], torch.zeros(7)),
        (["d_optim", "state", 0, "exp_avg_sq"], torch.tensor(torch.nan)),
    ],
)
def test_a_damaged_training_state_is_one_line(files, tmp_path, capsys, path, value):
    shutil.copytree(files / "run", tmp_path / "run")
    file = tmp_path / "run/checkpoints/000001.pt"
    content = checkpoint.read(file)
    spoiled(content, path, value)
    checkpoint.save(file, content)
    line = refused(capsys, train.main, ["--resume", str(tmp_path / "run"), "--iter", "2"])
    assert f"--resume {file}: its training state is damaged or of other networks" in line


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "", "config.json: damaged"),
        ("config.json", "[]", "config.json: damaged"),
        ("config.json", '{"config": 3}', "config.json: damaged"),
        ("config.json", "\x00" * 99, "config.json: damaged"),
        ("config.json", '{"config": {"iter": null}}', "config.json: iter is None, not int"),
        ("config.json", '{"config": {"lr": "0.1"}}', "config.json: lr is '0.1', not float"),
        ("config.json", '{"config": {"channels": [1, "x"]}}', "channels is (1, 'x'), not tuple"),
        ("config.json", '{"config": {"mirror": 1}}', "config.json: mirror is 1, not bool"),
        ("metrics.jsonl", "{}\n", "metrics.jsonl: line 1 is damaged"),
        ("metrics.jsonl", '{"iteration": 1}\n\x00\x00\n', "metrics.jsonl: line 2 is damaged"),
        ("metrics.jsonl", '{"iteration": 1, "d_loss": []}\n', "metrics.jsonl: line 1 is damaged"),
    ],
)
def test_a_damaged_run_is_one_line(files, tmp_path, capsys, name, text, message):
    shutil.copytree(files / "run", tmp_path / "run")
    (tmp_path / "run" / name).write_text(text)
    assert message in refused(
        capsys, train.main, ["--resume", str(tmp_path / "run"), "--iter", "2"]
    )


# Pictures


def gradient(side=8):
    return np.add.outer(np.arange(side), 10 * np.arange(side)).astype(np.uint8) * 2


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path):
    Image.fromarray(gradient().astype(np.uint16) * 257).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png"))[..., 0], gradient())


def test_palette_cmyk_and_grey_keep_their_colours(tmp_path):
    colours = Image.fromarray(np.stack([gradient(), 255 - gradient(), gradient() // 2], axis=-1))
    colours.quantize(256).save(tmp_path / "palette.png")
    colours.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    for name, tolerance in (("palette.png", 4), ("cmyk.jpg", 12)):
        read = read_image(tmp_path / name)
        assert read.mode == "RGB"
        np.testing.assert_allclose(
            np.asarray(read).astype(int), np.asarray(colours), atol=tolerance, err_msg=name
        )
    Image.fromarray(gradient()).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "grey.png"))[..., 2], gradient())


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    picture = Image.new("LA" if mode == "LA" else "RGBA", (4, 2), 0)
    picture.paste((0, 255) if mode == "LA" else (0, 0, 0, 255), (0, 0, 2, 2))
    if mode == "P":
        picture = Image.new("P", (4, 2), 1)
        picture.putpalette([0, 0, 0, 9, 9, 9])
        picture.paste(0, (0, 0, 2, 2))
        picture.info["transparency"] = 1
    picture.save(tmp_path / "a.png")
    pixels = np.asarray(read_image(tmp_path / "a.png"))
    assert (pixels[:, :2] == 0).all()
    assert (pixels[:, 2:] == 255).all()


def test_pictures_are_turned_as_their_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    picture = Image.new("RGB", (16, 8), "white")
    picture.paste("black", (0, 0, 8, 8))
    picture.save(tmp_path / "a.png", exif=exif)
    turned = np.asarray(read_image(tmp_path / "a.png"))
    assert turned.shape == (16, 8, 3)
    assert turned[:8].max() == 0
    assert turned[8:].min() == 255


def test_an_animation_is_its_first_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "a.webp").getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000)])
def test_odd_shapes_give_the_middle(tmp_path, size):
    picture = Image.new("RGB", size, "black")
    x, y = size[0] // 2, size[1] // 2
    picture.paste((255, 0, 0), (x - 2, y - 2, x + 2, y + 2))  # the filter reaches a pixel further
    picture.save(tmp_path / "a.png")
    image = Images(tmp_path, 8)[0, False]
    assert image.shape == (3, 8, 8)
    assert (image[0] == 1).all()
    assert (image[1] == -1).all()


def test_bombs_and_damaged_pictures_are_refused_without_noise(tmp_path, capfd):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")  # 50 KB, 1.2 GB decoded as RGB
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:200])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, reason in (("bomb", "bomb"), ("cut", "truncated"), ("empty", "unknown format")):
        with pytest.raises(UnreadableImageError, match=reason) as error:
            read_image(tmp_path / f"{name}.png")
        assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""


def test_large_photographs_are_read_without_a_warning(tmp_path, recwarn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # 64 pixels: above it, below twice as much
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (8, 8)
    assert not recwarn.list


# Label maps


@pytest.fixture
def pairs(files, tmp_path):
    shutil.copytree(files / "pairs", tmp_path / "pairs")
    return tmp_path / "pairs"


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"BM" + b"\xff" * 60, b"\xff\xd8x"])
@pytest.mark.parametrize("place", ["images", "labels"])
def test_damaged_pairs_are_named(pairs, place, content):
    file = pairs / place / "2.png"
    file.write_bytes(content)
    with pytest.raises(LabelMapError, match=str(file)):
        LabelMapDataset(pairs, 8, 19)[2]


@pytest.mark.parametrize("label", ["bomb", "16 bit", "RGB"])
def test_unfit_label_maps_are_named(pairs, label, monkeypatch):
    file = pairs / "labels/2.png"
    if label == "16 bit":
        Image.fromarray(np.zeros((8, 8), np.uint16)).save(file)
    elif label == "RGB":
        Image.new("RGB", (8, 8)).save(file)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 31)
    with pytest.raises(LabelMapError, match=r"2\.png"):
        LabelMapDataset(pairs, 8, 19)[2]


def test_left_overs_are_no_pictures(pairs):
    (pairs / "images/.tmp-abc-1.png").write_bytes(b"half")
    assert len(LabelMapDataset(pairs, 8, 19)) == 6


# LMDBs


def make_lmdb(folder, entries):
    with lmdb.open(str(folder), map_size=2**20) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({b"8-00000": b"", b"length": b"many"}, "a key 'length' of b'many'"),
        ({b"8-00000": b"", b"length": b"-1"}, "a key 'length' of b'-1'"),
        ({b"8-00000": b"", b"length": b"0"}, "a key 'length' of b'0'"),
        ({b"8-00000": b"", b"length": b"9" * 99}, "2 entries, but a key 'length'"),
        (
            {b"8-999999999999": b"", b"8-00000": b"", b"length": b"1000000000000"},
            "3 entries, but a key 'length'",
        ),
        ({b"8-00000": b"", b"prepare_data": b"{"}, "damaged 'prepare_data'"),
        ({b"8-00000": b"", b"prepare_data": b"[]"}, "damaged 'prepare_data'"),
        ({b"8-00000": b"", b"prepare_data": b'{"settings": {}}'}, "damaged 'prepare_data'"),
    ],
)
def test_hostile_lmdbs_are_named(tmp_path, entries, message):
    make_lmdb(tmp_path / "lmdb", entries)
    with pytest.raises(DatasetError, match=message) as error:
        Images(tmp_path / "lmdb", 8)
    assert str(error.value).startswith(f"{tmp_path}/lmdb: an LMDB with ")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_an_lmdb_that_was_cut_off_is_refused(files, tmp_path, part):
    noise = np.random.default_rng(0).bytes(20_000)
    make_lmdb(tmp_path / "lmdb", {b"8-00000": noise, b"8-00001": noise, b"length": b"2"})
    assert len(Images(tmp_path / "lmdb", 8)) == 2
    data = (tmp_path / "lmdb/data.mdb").read_bytes()
    (tmp_path / "lmdb/data.mdb").write_bytes(data[: int(part * len(data))])
    with pytest.raises(DatasetError, match="cut off"):  # reading on would end this process
        Images(tmp_path / "lmdb", 8)
    settings = PrepareSettings(path=files / "data", out=tmp_path / "lmdb", size=(8,))
    with pytest.raises(SettingError, match=f"^out {tmp_path}/lmdb: an LMDB that was cut off"):
        prepare(settings, progress=False)


def test_a_record_of_a_set_that_is_damaged_is_named(tmp_path):
    from Dataset import toon_faces

    for text in ("", "[1]", "\x00"):
        (tmp_path / "dataset.json").write_text(text)
        settings = toon_faces.ToonFacesSettings(out=tmp_path, n=1)
        with pytest.raises(SettingError, match=rf"^out {tmp_path}/dataset\.json: is damaged"):
            toon_faces.render_dataset(settings, progress=False)


def test_bombs_take_no_memory(files):
    """The same in a process that may not have the memory a bomb would take."""
    import multiprocessing

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peaks = pool.apply(peak_after_reading, (str(files),))
    assert peaks[1] - peaks[0] < 200 * 2**10  # KiB; a bomb takes a million


def peak_after_reading(folder):
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = peak()
    for kind in ("bomb", "lie", "huge_header"):
        for read in (checkpoint.read, lambda f: feature_statistics.load(f)):
            try:
                from pathlib import Path

                read(Path(folder) / f"bad/{kind}.file")
            except ValueError:
                continue
            raise AssertionError(kind)
    return before, peak()
