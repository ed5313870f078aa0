"""Every script and flag with values that cannot work: one line, exit code 2, nothing written.

To cover a new script, add it to `SCRIPTS` with flags that work; to cover a flag, add a case.
"""

import re

import pytest
import torch

import demo
import get_edited_image
import get_fid
import get_generated_image
import get_ppl
import get_projected_image
import prune
import train
import train_parser
from Dataset import loading, prepare_data, toon_faces
from Model import checkpoint
from Model.discriminator import Discriminator
from Model.generator import Generator
from tests.hostile import make_files
from Util import plot_log

SCRIPTS = {
    "prune": (prune, "--device cpu --ckpt model.pt --parser_ckpt parser.pt --out new"),
    "train": (
        train,
        "--path data --iter 1 --batch_size 2 --workers 0 --device cpu --out new --ckpt model.pt"
        " --parser_ckpt parser.pt",
    ),
    "train_parser": (
        train_parser,
        "--path pairs --out new/p.pt --device cpu --size 16 --iter 1 --batch_size 2",
    ),
    "demo": (demo, "--out new --n 1 --iter 1"),
    "get_fid": (
        get_fid,
        "--device cpu --ckpt model.pt --parser_ckpt parser.pt --features parser --path data"
        " --workers 0 --n_sample 60 --stats new/s.npz",
    ),
    "get_ppl": (
        get_ppl,
        "--device cpu --ckpt model.pt --perceptual parser --parser_ckpt parser.pt --n_sample 2",
    ),
    "get_generated_image": (get_generated_image, "--device cpu --ckpt model.pt --out new/g"),
    "get_edited_image": (
        get_edited_image,
        "--device cpu --ckpt model.pt --perceptual parser --parser_ckpt parser.pt --out new/e",
    ),
    "get_projected_image": (
        get_projected_image,
        "--device cpu --ckpt model.pt --perceptual parser --parser_ckpt parser.pt --out new"
        " --num_iters 1 --n_sample 1",
    ),
    "Dataset.images": (loading, "--path data --size 8 --n_batches 1 --runs 1 --workers 0"),
    "Dataset.prepare_data": (prepare_data, "--path data --out new --size 8 --workers 1"),
    "Dataset.toon_faces": (toon_faces, "--out new --n 1 --size 8 --workers 1"),
    "Util.plot_log": (plot_log, "--out new/curve.png"),
}

# Flags by what they take, and what each kind must refuse.
KINDS = {
    "count": ["0", "-1", "1.5", "x", ""],
    "count from 0": ["-1", "1.5", "x", "1e3"],
    "fraction": ["-0.1", "1.1", "nan", "inf", "x", ""],
    "positive": ["0", "-1", "nan", "inf", "x", ""],
    "file": ["none.pt", "data", "empty.file", ""],
    "folder": ["none", "model.pt"],
    "target": ["model.pt/x", "/proc/none/x"],
    "choice": ["", "none", "PARSER"],
    "device": ["tpu", "cuda:99", *([] if torch.cuda.is_available() else ["cuda"]), ""],
}
FLAGS = {
    "prune": {
        "count": "n_sample batch_size generated_img_size dcp_directions dcp_latents"
        " allocation_rounds max_parameters min_channels round_to",
        "count from 0": "seed",
        "fraction": "remove_ratio noise_prob",
        "positive": "dcp_alpha macs",
        "file": "ckpt parser_ckpt",
        "target": "out",
        "choice": "metric dcp_stop_gradient allocation allocation_tie",
        "device": "device",
    },
    "train": {
        "count": "iter batch_size path_batch_shrink d_reg_every g_reg_every fid_batch n_sample"
        " log_freq channel_multiplier moments_n_sample",
        "positive": "relation_step",
        "count from 0": "seed max_bad fid_n_sample val_sample_freq model_save_freq keep_checkpoints"
        " workers size gan_ramp batch_gpu lr_decay relation_group",
        "fraction": "mixing ema_decay",
        "file": "ckpt teacher_ckpt resume",
        "folder": "path",
        "target": "out",
        "choice": "kd_mode perceptual amp fid_features mirror tf32 discriminator relation_loss"
        " relation_gather high_band_side",
        "device": "device",
    },
    "train_parser": {
        "count": "size image_size n_classes width iter eval_every",
        "count from 0": "workers seed",
        "fraction": "val_fraction",
        "positive": "lr",
        "file": "eval_only",
        "folder": "path val_path",
        "target": "out",
        "choice": "stem_stride",
        "device": "device",
    },
    "demo": {"count": "n iter", "target": "out"},
    "get_fid": {
        "count": "n_sample batch_size",
        "count from 0": "generated_img_size seed workers",
        "fraction": "truncation",
        "file": "ckpt parser_ckpt stats",
        "folder": "path images",
        "choice": "features metrics",
        "device": "device",
    },
    "get_ppl": {
        "count": "n_sample batch_size",
        "count from 0": "generated_img_size seed",
        "positive": "eps",
        "file": "ckpt parser_ckpt",
        "choice": "perceptual",
        "device": "device",
    },
    "get_generated_image": {
        "count": "n_sample fps",
        "count from 0": "generated_img_size seed frames columns",
        "fraction": "truncation",
        "file": "ckpt",
        "target": "out",
        "choice": "noise colours",
        "device": "device",
    },
    "get_edited_image": {
        "count": "steps fps",
        "count from 0": "generated_img_size seed frames",
        "fraction": "truncation",
        "file": "ckpt parser_ckpt projection_a projection_b",
        "target": "out",
        "positive": "strength",
        "choice": "mode space layers colours perceptual directions",
        "device": "device",
    },
    "get_projected_image": {
        "count": "n_sample num_iters batch_size shown",
        "count from 0": "generated_img_size seed",
        "positive": "lr",
        "file": "ckpt parser_ckpt image_file",
        "target": "out",
        "choice": "optimizer perceptual",
        "device": "device",
    },
    "Dataset.images": {
        "count": "size batch_size n_batches runs",
        "count from 0": "workers",
        "folder": "path",
    },
    "Dataset.prepare_data": {
        "count": "size workers quality",
        "count from 0": "max_bad",
        "folder": "path",
        "target": "out",
        "choice": "format",
    },
    "Dataset.toon_faces": {
        "count": "n size workers",
        "count from 0": "seed start",
        "target": "out",
    },
    "Util.plot_log": {},  # below, since it needs a run
}
ALLOWED = {
    # What a kind refuses and this flag means something by: 0 is off or "as it is", and so on.
    ("train", "amp", "none"),
    ("get_fid", "stats", "none.pt"),  # will be made
    ("get_projected_image", "image_file", "data"),
    ("train", "ckpt", ""),
    ("train", "teacher_ckpt", ""),
    ("train", "resume", ""),
    ("train_parser", "seed", "-1"),
}
CASES = [
    (script, flag, value)
    for script, kinds in FLAGS.items()
    for kind, flags in kinds.items()
    for flag in flags.split()
    for value in KINDS[kind]
    if (script, flag, value) not in ALLOWED
]
TEACHER = "--teacher_ckpt model.pt --content_aware_KD False --kd_lpips_lambda 0"
MORE = [
    # Contradictions, and values that only the model, the data or another flag rules out.
    ("prune", "--remove_ratio 1", "below 1"),
    ("prune", "--generated_img_size 16", "contradicts"),
    ("prune", "--out model.pt", "is the checkpoint to prune"),
    ("prune", "--unknown 3", "unrecognized"),
    ("prune", "stray", "unrecognized"),
    ("prune", "--recipe x", "--recipe x: unknown; take cagc"),
    ("train", "--recipe x", "--recipe x: unknown; take cagc"),
    ("train", "--recipe cagc", "--teacher_ckpt is missing; cagc distils"),
    ("train", "--kd relation=1", "--teacher_ckpt is missing; relation=1 distils"),
    (
        "train",
        f"{TEACHER} --kd relation=1",
        "relation compares blocks from 16 px on; 8 px has none",
    ),
    ("train", f"{TEACHER} --kd relation=1 --relation_group 1", "relates to nothing; take 2"),
    (
        "train",
        f"{TEACHER} --kd relation=1 --relation_group 4 --relation_gather True",
        "--relation_gather relates all pictures, and relation_group 4 fewer",
    ),
    ("train", f"{TEACHER} --kd high_band=1", "features of 64 px, but the networks make 8 px"),
    ("train", f"{TEACHER} --kd moments=1 --moments_networks=", "--moments_networks is empty"),
    ("train", f"{TEACHER} --kd moments=1 --moments_networks vgg=1", "vgg=1: expected NAME=WEIGHT"),
    ("train", f"{TEACHER} --kd moments=1 --moments_networks clip=1", "--clip_ckpt is missing"),
    (
        "train",
        f"{TEACHER} --kd moments=1 --moments_networks parser=1 --parser_ckpt parser.pt"
        " --moments_file model.pt",
        "--moments_file model.pt: ",
    ),
    ("train", "--batch_size 8 --batch_gpu 2", "--batch_gpu 2 of 8 images"),
    (
        "train",
        f"{TEACHER} --kd moments=1 --batch_size 8 --batch_gpu 4",
        "--batch_gpu 4: the term moments compares all 8 images",
    ),
    ("train", TEACHER.replace("model", "other_latents"), "has latents of 16 numbers"),
    ("train", "--ckpt other_size.pt", "makes 8 px images, and the discriminator takes 16 px"),
    ("train", "--ckpt two_networks.pt", "g and g_ema are no two states of one network"),
    ("train", "--resume run --iter 99 --ckpt other.pt", "other.pt: the run to resume began with"),
    (
        "train",
        "--resume run --iter 99 --style_dim 7",
        "--style_dim 7: the run to resume began with",
    ),
    ("train", "--seed 99999999999999999999", "--seed must be below 2^63"),
    ("train", "--fid_stats /proc/none/x.npz", "--fid_stats /proc/none/x.npz"),
    ("prune", "--content -hair", "begins with a minus is written --content=-"),
    ("prune", "--metric l1_out --content eyes", "--content is for masks, and l1_out has none"),
    ("prune", "--metric random --out students/", "students/: no such folder; make it first"),
    ("get_fid", "--content hair", "--content goes with content_aware"),
    ("get_fid", "--path data --stats /proc/none/x.npz", "--stats /proc/none/x.npz"),
    ("get_ppl", "--protocols=", "protocols"),
    ("get_ppl", "--eps 1e-300", "--eps must be at least 1e-06"),
    ("get_projected_image", "--image_file data --out data", "--out data holds the pictures"),
    ("get_projected_image", "--parser model.pt", "holds g, g_ema, d, and no face parser"),
    ("train_parser", "--n_classes 300", "--n_classes must be at most 256"),
    ("train", "--size 12", "power of two"),
    ("train", "--size 16", "--size 16 contradicts"),
    ("train", "--ckpt= --size 12 --channels 4,4,4,4", "power of two"),
    ("train", "--ckpt= --size 8 --channels 4,4", "4 positive channel counts"),
    ("train", "--ckpt= --size 8 --channels 4,4,4,0", "4 positive channel counts"),
    ("train", "--ckpt= --size 8 --channels 4,a", "integers separated by commas"),
    ("train", "--load_train_state --ckpt=", "--load_train_state goes with ckpt"),
    ("train", "--lr nan", "--lr must be a finite number"),
    ("train", "--lr -1", "--lr must be at least 0"),
    ("train", "--r1 inf", "--r1 must be a finite number"),
    ("train", "--kd_l1_lambda -1", "--kd_l1_lambda must be at least 0"),
    ("train", "--content_aware_KD maybe", "neither True nor False"),
    ("train", "--out run", "holds a run already"),
    ("train", "--out model.pt", "model.pt"),
    ("train", "--resume run --iter 99 --size 16", "--size 16 contradicts"),
    ("train", "--resume data", "no config.json"),
    ("train", "--gpu_device_ids x", "integers separated by commas"),
    ("train_parser", "--batch_size 1", "--batch_size must be at least 2, not 1"),
    ("train_parser", "--batch_size 99", "more than the pictures"),
    ("train_parser", "--n_classes 2", "class"),
    ("train_parser", "--flip_pairs 1", "no pair of classes"),
    ("train_parser", "--flip_pairs 1,2,3", "no pair of classes"),
    ("train_parser", "--flip_pairs 1,99", "--flip_pairs 99: there is no such class"),
    ("train_parser", "--classes_excluded 99", "--classes_excluded 99: there is no such class"),
    ("train_parser", "--path data", "--path data: no folder images"),
    ("get_fid", "--n_sample 1", "at least 2, not 1"),
    ("get_fid", "--generated_img_size 16", "--generated_img_size 16 contradicts"),
    ("get_fid", "--metrics pr --n_sample 3", "--n_sample 3: pr needs at least 4 images"),
    ("get_fid", "--path none", "none: no such folder"),
    ("get_fid", "--metrics fid,x", "x: unknown; take fid, kid, pr"),
    ("get_fid", "--metrics ,", "--metrics is empty"),
    ("get_ppl", "--eps 1", "--eps"),
    ("get_ppl", "--generated_img_size 12", "--generated_img_size 12 contradicts"),
    ("get_generated_image", "--colours 7", "--colours"),
    ("get_generated_image", "--colours 257", "--colours"),
    ("get_generated_image", "--scale 1.5", "neither a whole number"),
    ("get_generated_image", "--scale 0.25", "leaves less than 8 px"),
    ("get_generated_image", "--scale -1", "neither a whole number"),
    ("get_generated_image", "--scale nan", "a finite number"),
    ("get_generated_image", "--generated_img_size 64", "--generated_img_size 64 contradicts"),
    ("get_generated_image", "--names a b", "need as many different names"),
    ("get_generated_image", "--names ../a --files 1", "no name of a folder"),
    ("get_generated_image", "--ckpt model.pt model.pt", "need as many different names"),
    ("get_edited_image", "--layers 9", "layers 0-3"),
    ("get_edited_image", "--layers 3-1", "layers 0-3"),
    ("get_edited_image", "--a -1", "numbers from 0 on"),
    ("get_edited_image", "--a=", "numbers from 0 on"),
    ("get_edited_image", "--a x", "integers separated by commas"),
    ("get_edited_image", "--mode morphing --a 0 --b 1,2", "a morph goes from each to one"),
    (
        "get_edited_image",
        "--mode directions --direction 99",
        "--direction 99: principal directions",
    ),
    ("get_edited_image", "--mode directions --direction=", "directions have the numbers 0 to"),
    ("get_edited_image", "--mode directions --layers 9", "layers 0-3"),
    ("get_edited_image", "--steps 2", "at least 3, not 2"),
    ("get_edited_image", "--projection_a latents.npz latents.npz", "a projection belongs"),
    ("get_edited_image", "--projection_a latents.npz --a 1", "the file has 0 to 0"),
    ("get_projected_image", "--perceptual_weight -1", "at least 0"),
    ("get_projected_image", "--mse_weight nan", "a finite number"),
    ("get_projected_image", "--image_file empty", "holds no pictures"),
    ("get_projected_image", "--out model.pt", "is no folder"),
    ("Dataset.images", "--path data none", "none: no such folder"),
    ("Dataset.prepare_data", "--path empty", "holds no images"),
    ("Dataset.prepare_data", "--out data", "holds other files"),
    ("Dataset.prepare_data", "--quality 90", "goes with the format jpeg"),
    ("Dataset.prepare_data", "--quality 101 --format jpeg", "at most 100"),
    ("Dataset.prepare_data", "--size 8,0", "--size must be"),
    ("Dataset.prepare_data", "--size ,", "--size must be"),
    ("Dataset.toon_faces", "--size 7", "--size must be at least 8, not 7"),
    ("Util.plot_log", "run --out model.pt/x", "--out"),
    ("Util.plot_log", "run --out /proc/none/x", "--out"),
    ("Util.plot_log", "--out x", "required: RUN"),
    ("Util.plot_log", "data", "no metrics.jsonl"),
    ("Util.plot_log", "none", "no metrics.jsonl"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flags")
    make_files(folder)
    (folder / "empty").mkdir()
    (folder / "empty.file").touch()
    torch.manual_seed(0)
    g, wide = (Generator(8, dim, 2, (6, 5, 4, 4)) for dim in (8, 16))
    checkpoint.save(folder / "other_latents.pt", {"g_ema": wide})
    checkpoint.save(folder / "other_size.pt", {"g": g, "d": Discriminator(16, channels=(5, 4, 4))})
    average = Generator(8, 8, 2, (6, 5, 4, 3))
    d = Discriminator(8, channels=(5, 4))
    checkpoint.save(folder / "two_networks.pt", {"g": g, "g_ema": average, "d": d})
    return folder


@pytest.fixture(autouse=True)
def _in_folder(files, monkeypatch):
    monkeypatch.chdir(files)


def listing(folder):
    return {str(f): f.stat().st_size for f in sorted(folder.rglob("*"))}


def outcome(capsys, script, argv):
    """Exit code and what was said on standard error, progress bars left out."""
    code = 0
    try:
        code = script.main(argv)
    except SystemExit as error:
        code = error.code
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return code, [line for line in lines if line.strip() and not is_bar(line)]


def is_bar(line):
    return re.search(r"%\||\[\d+:\d+<|\[00:00, ", line)


def check_refused(files, capsys, name, flags):
    script, good = SCRIPTS[name]
    before = listing(files)
    code, lines = outcome(capsys, script, [*good.split(), *flags])
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert "error: " in lines[0]
    assert "Traceback" not in lines[0]
    assert listing(files) == before
    return lines[0]


@pytest.mark.parametrize(("name", "flag", "value"), CASES)
def test_a_value_that_cannot_be(files, capsys, name, flag, value):
    line = check_refused(files, capsys, name, [f"--{flag}={value}"])
    assert flag in line or (value and value in line), line


@pytest.mark.parametrize(
    ("name", "flag", "more"),
    [
        ("train", "path", ""),
        ("train_parser", "path", ""),
        ("train_parser", "val_path", ""),
        ("get_fid", "path", ""),
        ("get_fid", "images", "--generated_img_size=8"),
        ("Dataset.images", "path", ""),
        ("Dataset.prepare_data", "path", ""),
    ],
)
def test_a_folder_is_named_with_its_own_flag_once(files, capsys, name, flag, more):
    line = check_refused(files, capsys, name, [f"--{flag}=none", *more.split()])
    assert re.fullmatch(rf"[^:]+: error: --{flag} none: no (such )?folder((?!--{flag}).)+", line)


@pytest.mark.parametrize(("name", "flags", "message"), MORE)
def test_what_only_the_rest_rules_out(files, capsys, name, flags, message):
    assert message in check_refused(files, capsys, name, flags.split())


WRONG = {
    "train_parser": "--path=none",
    "demo": "--out=model.pt/x",
    "Dataset.images": "--path=none",
    "Dataset.prepare_data": "--path=none",
    "Dataset.toon_faces": "--out=model.pt/x",
    "Util.plot_log": "none",
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_debug_shows_where_it_came_up(capsys, name, monkeypatch):
    script, good = SCRIPTS[name]
    file = WRONG.get(name, "--ckpt=none")
    argv = [*good.split(), file]
    assert outcome(capsys, script, argv)[0] == 2
    with pytest.raises((ValueError, OSError)):
        script.main([*argv, "--debug"])


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_flag_of_the_table(capsys, name):
    script, _ = SCRIPTS[name]
    with pytest.raises(SystemExit) as info:
        script.main(["--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    for flags in FLAGS[name].values():
        for flag in flags.split():
            assert f"--{flag}" in text
    assert "--debug" in text


# Extremes that do work.
WORKING = [
    ("prune", "--remove_ratio 0 --n_sample 1 --out {0}/a.pt"),
    ("prune", "--remove_ratio 0.999 --n_sample 1 --out {0}/b.pt"),
    ("prune", "--n_sample 3 --batch_size 7 --noise_prob 1 --out {0}/c.pt"),
    ("prune", "--n_sample 2 --batch_size 1 --noise_prob 1 --out {0}/d.pt"),
    ("train", "--batch_size 1 --iter 1 --out {0}/e"),
    ("train", "--batch_size 64 --iter 2 --out {0}/f"),  # more than there are pictures
    ("train", "--lr 0 --r1 0 --path_regularize 0 --mixing 1 --n_sample 1 --out {0}/g"),
    ("get_ppl", "--n_sample 1 --batch_size 9"),
    ("get_fid", "--n_sample 60 --batch_size 1000 --metrics fid,kid,pr --stats {0}/s.npz"),
    ("get_generated_image", "--n_sample 1 --frames 1 --out {0}/h"),
    ("get_generated_image", "--n_sample 3 --columns 9 --frames 0 --out {0}/i"),
    ("get_edited_image", "--a 0 --b 0 --layers 3 --frames 0 --out {0}/j"),
    ("get_projected_image", "--n_sample 1 --batch_size 9 --num_iters 1 --shown 9 --out {0}/k"),
]


@pytest.mark.parametrize(("name", "flags"), WORKING)
def test_extremes_that_work(tmp_path, capsys, name, flags):
    script, good = SCRIPTS[name]
    argv = [*good.split(), *flags.format(tmp_path).split()]
    assert outcome(capsys, script, argv)[0] == 0
