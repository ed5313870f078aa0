import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import train_parser
from Compression import parser_augmentation, parser_scores, parser_training
from Compression.content import load_content_parser
from Compression.parser_augmentation import Augmentation
from Compression.parser_training import ParserSettings
from Dataset.label_maps import LabelMapDataset, LabelMapError
from Model import bundled, checkpoint
from Model.face_parser import CELEBAMASK_NAMES, BiSeNet
from Util.pictures import to_uint8
from Util.settings import SettingError


def make_folder(path, count, side=32, seed=0):
    """Pictures of a red disc (1) and a green square (2) on blue ground (0)."""
    rng = np.random.default_rng(seed)
    for folder in ("images", "labels"):
        (path / folder).mkdir(parents=True)
    for i in range(count):
        image, label = Image.new("RGB", (side, side), (20, 30, 160)), Image.new("L", (side, side))
        for value, colour, shape in (
            (1, (200, 30, 30), "ellipse"),
            (2, (30, 190, 30), "rectangle"),
        ):
            x, y = rng.integers(2, side // 2, 2).tolist()
            box = (x, y, x + side // 3, y + side // 3)
            getattr(ImageDraw.Draw(image), shape)(box, fill=colour)
            getattr(ImageDraw.Draw(label), shape)(box, fill=value)
        image.save(path / "images" / f"{i:03d}.png")
        label.save(path / "labels" / f"{i:03d}.png")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("shapes") / "data", 24)


def flags(folder, tmp_path, *more):
    small = (
        "--size 32 --width 4 --stem_stride 2 --n_classes 3 --batch_size 8 --device cpu --lr 0.01"
    )
    out = ["--path", str(folder), "--out", str(tmp_path / "parser.pt")]
    return [*out, *small.split(), *more]


def test_flip_swaps_classes():
    images = torch.arange(2 * 3 * 2 * 4.0).view(2, 3, 2, 4)
    labels = torch.tensor([[[0, 2, 3, 1], [4, 4, 5, 18]]]).repeat(2, 1, 1)
    chosen = torch.tensor([True, False])
    flipped, mirrored = parser_augmentation.flip(
        images, labels, chosen, parser_augmentation.CELEBAMASK_FLIP_PAIRS
    )
    assert mirrored[0].tolist() == [[1, 2, 3, 0], [18, 4, 5, 5]]
    torch.testing.assert_close(mirrored[1], labels[1])
    torch.testing.assert_close(flipped[0], images[0].flip(2))
    torch.testing.assert_close(flipped[1], images[1])


def test_augmentation_keeps_picture_and_labels_together(folder):
    dataset = LabelMapDataset(folder, 32, 3)
    images, labels = (
        torch.stack(part) for part in zip(*(dataset[i] for i in range(8)), strict=True)
    )
    how = Augmentation(colour=0.0, noise=0.0)
    stream = torch.Generator().manual_seed(0)
    varied, moved = parser_augmentation.augment(images, labels, how, stream)
    assert (moved != labels).any()
    # Red is class 1, green class 2, blue class 0; only the blurred edges may disagree.
    seen = torch.tensor([1, 2, 0])[varied.argmax(1)]
    assert (seen != moved).float().mean() < 0.06


def test_augmentation_reduces_pictures_only():
    images, labels = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    how = Augmentation(image_size=16)
    images, labels = parser_augmentation.augment(images, labels, how, torch.Generator())
    assert (images.shape, labels.shape) == ((2, 3, 16, 16), (2, 32, 32))


def test_scores_against_closed_form():
    labels = torch.tensor([[[0, 0, 1, 1], [2, 2, 2, 2]]])
    predicted = torch.tensor([[[0, 1, 1, 1], [2, 2, 0, 3]]])
    confusion = parser_scores.confusion_matrix(predicted, labels, 5)
    is_content = torch.tensor([False, True, True, True, True])
    scores = parser_scores.scores_of(confusion, is_content, tuple("abcde"))
    assert scores.occurs.tolist() == [True, True, True, False, False]
    expected = torch.tensor([1 / 3, 2 / 3, 2 / 4], dtype=torch.float64)
    torch.testing.assert_close(scores.class_iou[:3], expected)
    assert scores.class_iou[3] == 0
    assert scores.class_iou[4].isnan()
    assert scores.mean_iou == pytest.approx(expected.mean().item())
    assert scores.content_iou == pytest.approx(5 / 7)


def test_loss_adds_the_auxiliary_outputs():
    labels = torch.randint(0, 3, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    main, same, small = (torch.randn(2, 3, n, n, generator=generator) for n in (8, 8, 4))
    loss = parser_training.segmentation_loss((main, same, small), labels, 0.25)
    terms = [F.cross_entropy(*pair) for pair in ((same, labels), (small, labels[:, ::2, ::2]))]
    torch.testing.assert_close(loss, F.cross_entropy(main, labels) + 0.25 * sum(terms))


def test_learning_rate_rises_then_falls():
    factors = [parser_training.learning_rate_factor(step, 200) for step in range(200)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] == factors[10] == 1
    assert sorted(factors[10:], reverse=True) == factors[10:]
    assert factors[-1] < 0.001


def test_training_learns_and_saves(folder, tmp_path, capsys):
    small = {"size": 32, "width": 4, "stem_stride": 2, "n_classes": 3, "batch_size": 8}
    where = {"path": folder, "out": tmp_path / "parser.pt", "device": "cpu"}
    settings = ParserSettings(**where, **small, iter=60)
    losses = []
    scores = parser_training.train_parser(settings, lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert scores.mean_iou > 0.6
    network = checkpoint.load_face_parser(tmp_path / "parser.pt")
    assert (network.n_classes, network.width, network.stem_stride) == (3, 4, 2)
    assert network.input_size == 32
    assert [file.name for file in tmp_path.iterdir()] == ["parser.pt"]
    arguments = ["--eval_only", str(tmp_path / "parser.pt"), "--path", str(folder)]
    assert train_parser.main(arguments) == 0
    mean_iou = float(capsys.readouterr().out.split("classes: ")[1].split()[0])
    assert mean_iou > 0.6


def test_what_is_printed(folder, tmp_path, capsys):
    named = ["--iter", "3", "--eval_every", "2", "--class_names", "ground,disc,square"]
    assert train_parser.main(flags(folder, tmp_path, *named)) == 0
    number = r"(0\.\d{4}|1\.0000)"
    scores = rf"loss \d\.\d+, mean IoU {number}, content-mask IoU {number}"
    lines = [
        *(f"iteration 2: {scores}", f"iteration 3: {scores}"),
        *(r"class +IoU", f"  0 ground +{number}", f"  1 disc +{number}", f"  2 square +{number}"),
        *(f"mean IoU of the 3 classes: {number}", f"content-mask IoU: {number}"),
        f"wrote {tmp_path}/parser.pt",
    ]
    assert re.fullmatch("\n".join(lines) + "\n", capsys.readouterr().out)


@pytest.mark.parametrize("excluded", [(0, 2, 3), (1,), ()])
def test_the_excluded_classes_reach_the_mask(folder, tmp_path, capsys, excluded):
    """They are stored with the parser, and whatever makes masks with it takes them."""
    four = ["--n_classes", "4", "--val_path", str(folder), "--iter", "30"]
    chosen = ["--classes_excluded", *map(str, excluded)]
    assert train_parser.main(flags(folder, tmp_path, *four, *chosen)) == 0
    trained = capsys.readouterr().out.splitlines()[-2]
    parser = load_content_parser(tmp_path / "parser.pt", torch.device("cpu"))
    assert parser.network.classes_excluded == excluded
    images = torch.stack([LabelMapDataset(folder, 32, 4)[i][0] for i in range(8)])
    classes = parser.parse(images)
    assert {0, 1, 2} <= set(classes.unique().tolist())
    content = ~torch.isin(classes, torch.tensor(excluded))
    torch.testing.assert_close(parser(images)[:, 0], content.float())
    scoring = ["--eval_only", str(tmp_path / "parser.pt"), "--val_path", str(folder)]
    assert train_parser.main(flags(folder, tmp_path, *scoring)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == trained


def test_parsers_without_classes_have_the_usual_ones(tmp_path):
    """Published files hold no config, and older ones no classes in it."""
    bundled_parser = checkpoint.load_face_parser(bundled.PARSER)
    assert bundled_parser.classes_excluded == (0, 16)
    assert bundled_parser.class_names == CELEBAMASK_NAMES
    torch.save(BiSeNet(3, width=2).state_dict(), tmp_path / "bare.pth")
    bare = load_content_parser(tmp_path / "bare.pth", torch.device("cpu"))
    assert bare.network.classes_excluded == (0,)
    assert bare.network.class_names == ("class 0", "class 1", "class 2")
    assert bare.is_content.tolist() == [0, 1, 1]


def test_the_seed_decides_the_run(folder, tmp_path):
    states = []
    for name in "ab":
        arguments = flags(folder, tmp_path / name, "--iter", "2", "--seed", "3")
        assert train_parser.main(arguments) == 0
        states.append(checkpoint.load_face_parser(tmp_path / name / "parser.pt").state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def small(folder, tmp_path, **more):
    sizes = {"size": 32, "width": 4, "stem_stride": 2, "n_classes": 3, "batch_size": 8}
    where = {"path": folder, "out": tmp_path / "parser.pt", "device": "cpu"}
    return ParserSettings(**where, **sizes, **more)


def test_training_ends_early_and_keeps_the_best(folder, tmp_path, monkeypatch):
    found, states = iter([0.2, 0.5, 0.4, 0.3, 0.9]), []

    def scripted(parser, batches, image_size):
        states.append({k: v.clone() for k, v in parser.network.state_dict().items()})
        return parser_scores.Scores(torch.zeros(3), torch.ones(3), next(found), 0.0, ("",) * 3)

    monkeypatch.setattr(parser_training, "evaluate", scripted)
    steps = []
    settings = small(folder, tmp_path, iter=20, eval_every=2, patience=2)
    parser_training.train_parser(settings, lambda step, loss: steps.append(step))
    assert steps[-1] == 8  # two evaluations after the best, at 4
    best = checkpoint.load_face_parser(tmp_path / "parser.pt").state_dict()
    for name, value in best.items():
        assert torch.equal(value, states[1][name])


def test_class_weights_are_a_power_of_the_share(folder, tmp_path):
    settings = small(folder, tmp_path, class_balance=0.5)
    dataset = LabelMapDataset(folder, 32, 4)
    labels = torch.stack([dataset[i][1] for i in range(len(dataset))])
    shares = torch.bincount(labels.flatten(), minlength=3) / labels.numel()
    weights = parser_training._class_weights(dataset, settings)
    torch.testing.assert_close(weights / weights[0], (shares / shares[0]) ** -0.5)
    assert (weights * shares).sum().item() == pytest.approx(1)
    four = parser_training._class_weights(dataset, replace(settings, n_classes=4))
    assert four[3] == 1  # a class that never occurs
    assert parser_training._class_weights(dataset, small(folder, tmp_path)) is None
    logits = torch.randn(2, 3, 32, 32)
    loss = parser_training.segmentation_loss((logits,), labels[:2], 0.0, weights)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels[:2], weights))


def test_a_run_goes_on_from_its_last_evaluation(folder, tmp_path, capsys):
    def stop(step, loss):
        if step == 6:
            raise KeyboardInterrupt

    settings = small(folder, tmp_path, iter=8, eval_every=4)
    with pytest.raises(KeyboardInterrupt):
        parser_training.train_parser(settings, stop)
    state = checkpoint.read(settings.state_file)
    run = parser_training.ParserRun(BiSeNet(3, 4, 2, 32), settings, torch.Generator())
    run.load(settings.state_file)
    assert run.step == 4
    assert run.optimiser.param_groups[0]["lr"] == pytest.approx(
        settings.lr * parser_training.learning_rate_factor(4, 8)
    )
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, state["parser"][name])
    moment = next(iter(run.optimiser.state.values()))["exp_avg"]
    assert moment.abs().max() > 0
    with pytest.raises(
        SettingError, match=r"out .* is of a run that was stopped; --resume goes on"
    ):
        parser_training.train_parser(settings)
    other = flags(folder, tmp_path, "--resume", "--width", "2", "--iter", "8")
    assert train_parser.main(other) == 2
    assert "parser.pt.state is of a parser with other sizes" in capsys.readouterr().err
    with pytest.raises(SettingError, match="is of a run with seed 0, not 1"):
        parser_training.train_parser(replace(settings, resume=True, seed=1))
    with pytest.raises(SettingError, match=r"is of a run with lr 0.01, not 0.001"):
        parser_training.train_parser(replace(settings, resume=True, lr=0.001))
    steps = []
    parser_training.train_parser(
        replace(settings, resume=True), lambda step, loss: steps.append(step)
    )
    assert steps == [5, 6, 7, 8]
    assert [file.name for file in tmp_path.iterdir()] == ["parser.pt"]
    with pytest.raises(SettingError, match="is finished; another out starts anew"):
        parser_training.train_parser(replace(settings, resume=True))


def test_the_report_shows_the_worst_first(folder, tmp_path):
    assert train_parser.main([*flags(folder, tmp_path), "--iter", "20"]) == 0
    parser = load_content_parser(tmp_path / "parser.pt", torch.device("cpu"))
    dataset = LabelMapDataset(folder, 32, 3)
    scored = []
    for i in range(len(dataset)):
        image, labels = dataset[i]
        confusion = parser_scores.confusion_matrix(parser.parse(image[None]), labels, 3)
        found = parser_scores.scores_of(confusion, parser.is_content, ("", "", ""))
        scored.append((found.mean_iou, i))
    batches = [tuple(t[None] for t in dataset[i]) for i in range(len(dataset))]
    picture = parser_scores.worst_cases(parser, batches, n=2)
    worst = [dataset[i][0] for _, i in sorted(scored)[:2]]
    shown = to_uint8(torch.stack(worst))
    side = 32
    left = picture.shape[1] - 2 * side - 4
    for k, expected in enumerate(shown):
        x = left + k * (side + 4)
        np.testing.assert_array_equal(picture[:side, x : x + side], expected)
    report = ["--report", str(tmp_path / "worst.png"), "--eval_only", str(tmp_path / "parser.pt")]
    assert train_parser.main(flags(folder, tmp_path, *report)) == 0
    assert Image.open(tmp_path / "worst.png").height > 4 * side


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resume"], "parser.pt.state is missing; train without it"),
        (["--report", "/proc/x/worst.png"], "--report /proc/x/worst.png: "),
        (["--patience", "-1"], "--patience must be at least 0, not -1"),
        (["--class_balance", "2"], "--class_balance must be at most 1, not 2.0"),
        (["--path", "/nowhere"], "--path /nowhere: no such folder"),
        (["--val_path", "/nowhere"], "--val_path /nowhere: no such folder"),
        (["--batch_size", "1"], "--batch_size must be at least 2, not 1"),
        (["--batch_size", "64"], "--batch_size 64: more than"),
        (["--batch_size", "none"], "--batch_size"),
        (["--val_fraction", "1.5"], "--val_fraction must be below 1, not 1.5"),
        (["--lr", "0"], "--lr must be above 0, not 0.0"),
        (["--device", "tpu"], "--device tpu: unknown"),
        (["--stem_stride", "3"], "--stem_stride 3: unknown; take 1, 2, 4"),
        (["--n_classes", "2"], "raise n_classes"),
        (["--n_classes", "2", "--workers", "1"], "raise n_classes"),
        (["--flip_pairs", "1,7"], "--flip_pairs 7: there is no such class in 0 to 2"),
        (["--classes_excluded", "16"], "--classes_excluded 16: there is no such class in 0 to 2"),
        (["--class_names", "a,b"], "--class_names names 2 classes, but there are 3"),
        (
            ["--class_names", "a,b,\x1b"],
            "--class_names face parser: class_names are not 3 print",
        ),
        (["--eval_only", "/nowhere.pt"], "--eval_only /nowhere.pt: no such file"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, capsys, more, said):
    try:
        code = train_parser.main(flags(folder, tmp_path, "--iter", "3", *more))
    except SystemExit as stop:
        code = stop.code
    errors = [line for line in capsys.readouterr().err.splitlines() if "training:" not in line]
    errors = [line for line in errors if line.strip()]
    assert code == 2
    assert len(errors) == 1
    assert said in errors[0]


def test_dataset_names_the_file(tmp_path):
    folder = make_folder(tmp_path / "data", 2)
    label = folder / "labels" / "001.png"
    Image.new("L", (32, 16)).save(label)
    with pytest.raises(LabelMapError, match=r"labels/001.png has 32x16 pixels, its picture 32x32"):
        LabelMapDataset(folder, 32, 3)[1]
    Image.new("RGB", (32, 32)).save(label)
    with pytest.raises(LabelMapError, match=r"labels/001.png is in mode RGB"):
        LabelMapDataset(folder, 32, 3)[1]
    label.write_bytes(b"no picture")
    with pytest.raises(LabelMapError, match=r"cannot read .*labels/001.png"):
        LabelMapDataset(folder, 32, 3)[1]
    label.unlink()
    with pytest.raises(LabelMapError, match=r"images/001.png has no label map"):
        LabelMapDataset(folder, 32, 3)


def test_dataset_resizes(tmp_path):
    folder = make_folder(tmp_path / "data", 1, side=64)
    image, label = LabelMapDataset(folder, 16, 3)[0]
    assert (image.shape, image.dtype) == ((3, 16, 16), torch.float32)
    assert (label.shape, label.dtype) == ((16, 16), torch.int64)
    assert -1 <= image.min() < image.max() <= 1
    assert set(label.unique().tolist()) == {0, 1, 2}
