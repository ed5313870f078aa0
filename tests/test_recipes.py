import os
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import prune
import train
from Compression import pruning, recipes
from Compression import run as training_run
from Compression.initialisation import INITIALISATIONS
from Compression.recipes import RECIPES
from Model import bundled, checkpoint
from tests.helpers import error_of
from Util.run_log import read_config, read_metrics

FACES = os.path.relpath(bundled.PARSER)  # the repository's path may have spaces

# Some initialisations are files of their own; a recipe only names them.
KNOWN = [name for name, recipe in RECIPES.items() if recipe.prune["init"] in INITIALISATIONS]
OFFLINE = f"--perceptual parser --parser_ckpt {FACES}"
SMALL = "--batch_size 2 --workers 0 --device cpu --log_freq 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled teacher and a few pictures."""
    folder = tmp_path_factory.mktemp("recipes")
    content = checkpoint.read(bundled.MODEL)
    checkpoint.save(folder / "teacher.pt", {key: content[key] for key in ("g_ema", "d")})
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"data/{i}.png")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_a_flag_and_keeps_its_type(name):
    for values, kinds in (
        (RECIPES[name].prune, [pruning.PruneSettings, *pruning.option_kinds()]),
        (RECIPES[name].train, [training_run.TrainConfig, *training_run.option_kinds()]),
    ):
        defaults = {key: value for kind in kinds for key, value in vars(kind()).items()}
        for key, value in values.items():
            assert type(value) is type(defaults[key]), key


@pytest.mark.parametrize("name", RECIPES)
def test_the_printed_flags_mean_the_recipe(name, capsys):
    assert train.main(["--recipe", "list"]) == 0
    lines = iter(capsys.readouterr().out.splitlines())
    while not next(lines).startswith(f"{name}: "):
        pass
    _, *flags = shlex.split(next(lines))
    if name in KNOWN:
        parser = train.OneLineParser()
        train.add_flags(parser, pruning.PruneSettings, *pruning.option_kinds())
        assert (
            recipes.prune_values(name).items()
            <= (vars(parser.parse_args(flags)) | {"recipe": name}).items()
        )
    _, *flags = shlex.split(next(lines))
    by_flags = train.parse_config(["--path", ".", *flags, "--recipe", "none"])
    by_name = train.parse_config(["--path", ".", "--recipe", name])
    assert train.replace(by_flags, recipe=name) == by_name


def test_what_papers_changed_and_what_they_left():
    cagc, svs = RECIPES["cagc"].train, RECIPES["svs"].train
    assert cagc["batch_size"] * (cagc["iter"] - 1) == 7_200_000
    assert svs["batch_size"] * svs["iter"] == 15_000_000
    # Half-lives of the moving averages, in images.
    for name, images in (("cagc", 5_000), ("svs", 10_000), ("nickel_dime", 20_000)):
        values = RECIPES[name].train
        half = np.log(0.5) / np.log(values["ema_decay"]) * values["batch_size"]
        assert half == pytest.approx(images)
    defaults = vars(training_run.TrainConfig())
    assert {key for key, value in cagc.items() if defaults[key] != value} == {"iter"}
    assert RECIPES["dcp"].train == RECIPES["stylekd"].train


def test_flags_win_over_the_recipe_wherever_they_stand():
    for argv in (
        ["--recipe", "svs", "--batch_size", "5"],
        ["--batch_size", "5", "--recipe", "svs"],
    ):
        config = train.parse_config(["--path", ".", *argv, "--relation_step", "2"])
        assert (config.batch_size, config.iter, config.discriminator) == (5, 468_750, "scratch")
        (options,) = (o for o in config.options if hasattr(o, "relation_step"))
        assert (options.relation_step, options.relation_loss) == (2.0, "kl")


@pytest.mark.parametrize("name", KNOWN)
def test_prune_and_two_iterations_of_every_recipe(folder, tmp_path, name):
    pruned, teacher = tmp_path / "pruned.pt", folder / "teacher.pt"
    flags = f"--recipe {name} --n_sample 2 --batch_size 2 --device cpu --noise_prob 1"
    if RECIPES[name].prune["metric"] == "diversity_aware":
        flags += " --dcp_directions 2 --dcp_latents 200"
    if RECIPES[name].prune["init"] == "reconstruction":
        flags += " --init_n_sample 2"
    flags += f" --ckpt {teacher} --parser_ckpt {FACES} --out {pruned}"
    assert prune.main(flags.split()) == 0
    config = checkpoint.read(pruned)["config"]
    assert (config["recipe"], config["batch_size"]) == (name, 2)
    assert config["metric"] == RECIPES[name].prune["metric"]

    flags = f"--path {folder}/data --ckpt {pruned} --teacher_ckpt {teacher} --out {tmp_path}/run"
    if name == "nickel_dime":
        flags += " --moments_networks parser=20 --moments_n_sample 8"
        flags += f" --moments_file {tmp_path}/m.npz"
    assert train.main(f"{flags} {OFFLINE} {SMALL} --iter 2".split()) == 0
    saved = read_config(tmp_path / "run")
    assert (saved["recipe"], saved["iter"]) == (name, 2)
    assert saved["discriminator"] == RECIPES[name].train["discriminator"]
    rows = read_metrics(tmp_path / "run")
    terms = {
        "nickel_dime": {"kd_moments_parser", "kd_teacher_discriminator", "kd_high_band"},
        "cagc": {"kd_l1", "kd_parser"},
        "ours": {"kd_l1", "kd_parser"},
    }.get(name, {"kd_l1", "kd_parser", "kd_relation"})
    assert {key for key in rows[-1] if key.startswith("kd_")} == terms
    config = checkpoint.read(tmp_path / "run/checkpoints/000002.pt")["config"]
    assert (config["recipe"], config["metric"]) == (name, RECIPES[name].prune["metric"])
    assert config["training"]["teacher_ckpt"] == "teacher.pt"
    if saved["content_aware_KD"]:
        assert config["training"]["content"] == "all,-background,-cloth"
        assert config["training"]["parser_ckpt"] == bundled.PARSER.name


def test_two_discriminators_and_moments_resume_exactly(folder, tmp_path):
    teacher = folder / "teacher.pt"
    flags = f"--recipe nickel_dime --path {folder}/data --ckpt {teacher} --teacher_ckpt {teacher}"
    flags += f" --moments_networks parser=20 --moments_n_sample 8 --moments_file {tmp_path}/m.npz"
    flags += f" --parser_ckpt {FACES} {SMALL} --d_reg_every 2"
    for run, iterations in (("whole", 4), ("parts", 2)):
        assert (
            train.main([*flags.split(), "--out", f"{tmp_path}/{run}", "--iter", str(iterations)])
            == 0
        )
    assert train.main(["--resume", str(tmp_path / "parts"), "--iter", "4"]) == 0
    whole, parts = (
        checkpoint.read(tmp_path / run / "checkpoints/000004.pt") for run in ("whole", "parts")
    )
    for network in ("g", "g_ema", "d", "teacher_discriminator"):
        torch.testing.assert_close(parts[network], whole[network], rtol=0, atol=0)
    assert parts["config"]["recipe"] == "nickel_dime"


def test_train_takes_the_recipe_from_the_checkpoint(folder, tmp_path):
    content = checkpoint.read(folder / "teacher.pt")
    file = tmp_path / "pruned.pt"
    checkpoint.save(file, {**content, "config": {"recipe": "stylekd"}})
    common = ["--path", ".", "--ckpt", str(file)]
    config = train.parse_config([*common, "--batch_size", "4"])
    assert (config.recipe, config.kd, config.batch_size) == ("stylekd", ("relation=30",), 4)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/000001.pt").write_bytes(file.read_bytes())
    config = train.parse_config(["--path", ".", "--ckpt", str(tmp_path / "run")])
    assert config.recipe == "stylekd"  # of the run's newest checkpoint
    config = train.parse_config([*common, "--recipe", "cagc"])
    assert (config.recipe, config.kd, config.discriminator) == ("cagc", (), "teacher")
    config = train.parse_config([*common, "--recipe", "none"])
    assert (config.recipe, config.kd) == ("", ())


@pytest.mark.parametrize("config", [3, {"recipe": "unknown"}, {"recipe": ["x"]}, {}])
def test_a_checkpoint_that_remembers_nothing_of_use(folder, tmp_path, config):
    file = tmp_path / "a.pt"
    checkpoint.save(file, {"g": {}, "config": config})
    assert recipes.remembered(str(file)) == ""


def test_bad_recipes_are_one_line(folder, tmp_path, capsys):
    bad = ["--recipe", "none_such", "--out", str(tmp_path / "new")]
    for call in (lambda: prune.main(bad), lambda: train.main(["--path", ".", *bad])):
        assert "--recipe none_such: unknown; take cagc, " in error_of(capsys, call)
    argv = ["--path", f"{folder}/data", "--recipe", "cagc", "--out", str(tmp_path / "new")]
    assert "--teacher_ckpt is missing; cagc" in error_of(capsys, lambda: train.main(argv))
    argv += ["--teacher_ckpt", "none"]
    assert "--recipe none goes without" in error_of(capsys, lambda: train.main(argv))
    argv = ["--resume", str(tmp_path), "--recipe", "cagc"]
    assert "a resumed one keeps its settings" in error_of(capsys, lambda: train.main(argv))
    assert not list(tmp_path.iterdir())


def test_discriminators_from_scratch(folder, tmp_path):
    d = checkpoint.read(folder / "teacher.pt")["d"]
    flags = f"--path {folder}/data --ckpt {folder}/teacher.pt {SMALL} --iter 1 --lr 0"
    for name in ("teacher", "scratch"):
        run = tmp_path / name
        assert train.main([*flags.split(), "--discriminator", name, "--out", str(run)]) == 0
        trained = checkpoint.read(run / "checkpoints/000001.pt")["d"]
        assert all(value.shape == trained[key].shape for key, value in d.items())
        same = [torch.equal(value, trained[key]) for key, value in d.items() if "weight" in key]
        assert all(same) if name == "teacher" else not any(same)


def test_a_new_discriminator_is_as_wide_as_the_teacher(folder, tmp_path):
    content = checkpoint.read(folder / "teacher.pt")
    alone = tmp_path / "teacher.pt"
    checkpoint.save(alone, {"g_ema": content["g_ema"]})
    checkpoint.save(tmp_path / "pruned.pt", {"g_ema": content["g_ema"]})
    argv = (
        f"--path {folder}/data --ckpt {tmp_path}/pruned.pt --teacher_ckpt {alone} {SMALL} --iter 1"
        f" --out {tmp_path}/run --discriminator scratch --content_aware_KD False"
        " --kd_lpips_lambda 0"
    )
    assert train.main(argv.split()) == 0
    made = checkpoint.load_discriminator(tmp_path / "run")
    assert made.channels == checkpoint.load_generator(alone).channels[1::2]
