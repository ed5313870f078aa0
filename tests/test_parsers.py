import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

import get_fid
import prune
from Compression.content import ContentParser, load_content_parser
from Compression.parsers import PARSERS, Loaded, ParserKind, load_parser, script_module
from Dataset import toon_faces
from Model import bundled, checkpoint

FACES = os.path.relpath(bundled.PARSER)  # the repository's path may have spaces

CPU = torch.device("cpu")
FACTS = {"input_size": 16, "class_names": ["background", "red", "green"]}


class ByColour(nn.Module):
    """Logits of three classes: none, red, green."""

    def forward(self, x):
        return torch.stack([torch.full_like(x[:, 0], 0.5), x[:, 0], x[:, 1]], 1)


def save_module(folder, network=None, facts=None, name="module.pt"):
    torch.jit.trace(network or ByColour(), torch.rand(1, 3, 16, 16)).save(folder / name)
    (folder / name).with_suffix(".json").write_text(json.dumps(facts or FACTS))
    return folder / name


@pytest.fixture(scope="module")
def colours():
    """A red and a green picture, each blue on its left half."""
    images = torch.full((2, 3, 32, 32), -1.0)
    images[:, 2, :, :16] = 1
    images[0, 0, :, 16:] = images[1, 1, :, 16:] = 1
    return images


def test_none_takes_every_pixel(colours):
    parser = load_content_parser("none", CPU)
    assert parser(colours).min() == parser.soft(colours).min() == 1
    assert (parser.name, parser.content) == ("none", "all")
    with pytest.raises(ValueError, match="none takes no file"):
        load_parser("none:x.pt", CPU)


def test_a_module_is_told_by_its_json(tmp_path, colours):
    file = save_module(tmp_path)
    parser = load_content_parser(file, CPU, ("red",))
    mask = parser(colours)
    assert mask[0, 0, :, 17:].min() == 1
    assert mask[0, 0, :, :15].max() == mask[1].max() == 0
    assert load_content_parser(f"module:{file}", CPU)(colours)[:, :, :, 17:].min() == 1
    assert "content red" in parser.protocol


@pytest.mark.parametrize("output", ["probabilities", "classes", "mask"])
def test_what_a_module_may_put_out(tmp_path, colours, output):
    class Network(nn.Module):
        def forward(self, x):
            logits = ByColour()(x)
            if output == "classes":
                return logits.argmax(1)
            inside = (x[:, :1] > 0.5).float() * 0.8 + 0.1
            return inside if output == "mask" else logits.softmax(1)

    names = FACTS["class_names"][: 2 if output == "mask" else 3]
    facts = FACTS | {"output": output, "class_names": names}
    parser = load_content_parser(save_module(tmp_path, Network(), facts), CPU, ("red",))
    mask, soft = parser(colours), parser.soft(colours)
    assert mask[0, 0, :, 17:].min() == 1
    assert mask[1].max() == 0
    expected = {
        "classes": 1.0,
        "mask": 0.9,
        "probabilities": ByColour()(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1))
        .softmax(1)[0, 1]
        .item(),
    }
    assert soft[0, 0, 8, 24].item() == pytest.approx(expected[output], abs=1e-4)


def test_normalisation_follows_the_json(tmp_path, colours):
    facts = FACTS | {"mean": [0.5, 0.0, 0.0], "std": [0.5, 1.0, 1.0]}
    parser = load_parser(save_module(tmp_path, facts=facts), CPU).parser
    seen = parser.prepare(colours)
    assert seen.shape == (2, 3, 16, 16)
    assert seen[0, :, 8, 12].tolist() == [1, 0, 0]
    assert seen[1, :, 8, 12].tolist() == [-1, 1, 0]


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x


class Flat(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


class Narrow(nn.Module):
    def forward(self, x):
        return x.reshape(len(x), -1, 7)


@pytest.mark.parametrize(
    ("network", "facts", "said"),
    [
        (None, {"class_names": ["a", "b"]}, "puts out 3 classes, but 2 are named"),
        (TwoOutputs(), {}, "returns a tuple, not a tensor"),
        (Flat(), {}, r"made \(1, 3\) torch.float32 of 1 picture; expected logits"),
        (None, {"output": "mask", "class_names": ["a", "b"]}, r"masks of shape \(1, 3, 16, 16\)"),
        (None, {"output": "classes"}, "floating-point numbers, not classes"),
        (None, {"input_size": "16"}, "input_size is 16; see doc/content.md"),
        (None, {"mean": [0, 0]}, "mean is"),
        (None, {"std": [0, 1, 1]}, "std is"),
        (None, {"classes_excluded": [3]}, "classes_excluded is"),
        (None, {"output": "masks"}, "output is masks"),
        (None, {"class_names": []}, "class_names is"),
        (None, {"sides": 3}, "expected an object of"),
    ],
)
def test_a_module_that_does_not_fit_is_one_line(tmp_path, network, facts, said):
    with pytest.raises(ValueError, match=said) as error:
        load_parser(save_module(tmp_path, network, FACTS | facts), CPU)
    assert str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


class Writes(nn.Module):
    def forward(self, x):
        torch.save(x, "written")
        return x


class OnLoad(nn.Module):
    @torch.jit.export
    def __getstate__(self):
        return 3

    @torch.jit.export
    def __setstate__(self, state: int):
        self.training = False

    def forward(self, x):
        return x


@pytest.mark.parametrize(("network", "word"), [(Writes(), "save"), (OnLoad(), "__setstate__")])
def test_programs_that_do_more_than_compute_are_refused(tmp_path, monkeypatch, network, word):
    monkeypatch.chdir(tmp_path)
    torch.jit.script(network).save(tmp_path / "module.pt")
    (tmp_path / "module.json").write_text(json.dumps(FACTS))
    with pytest.raises(ValueError, match=f"refused, its program has {word}"):
        load_parser(tmp_path / "module.pt", CPU)
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize(
    "source",
    [
        "_0 = ops.image.write_file(CONSTANTS.c0, x)",
        "_0 = (ops # prim\n .image.write_file(CONSTANTS.c0, x))",
        "_0 = (ops\n .prim.NumToTensor(1))",
        "_0 = 1if True else 0or(ops).image.read_file(CONSTANTS.c0)",
    ],
)
def test_operators_of_other_libraries_are_refused_however_they_are_written(source):
    with pytest.raises(ValueError, match="refused, its program has ops"):
        script_module._check_names(Path("module.pt"), source)


def test_pytorchs_own_operators_are_not():
    script_module._check_names(Path("module.pt"), "_0 = ops.prim.NumToTensor(torch.size(x, 0))")


class Bomb:
    def __reduce__(self):
        return (open, ("written", "w"))


def test_pickles_and_exported_programs_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(ByColour(), (torch.rand(1, 3, 16, 16),)), "module.pt2")
    torch.save(Bomb(), tmp_path / "bomb.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    for name, said in (
        ("module.pt2", "torch.export"),
        ("bomb.pt", "no TorchScript module"),
        ("bare.pt", "no TorchScript module|no whole zip archive"),
    ):
        (tmp_path / name).with_suffix(".json").write_text(json.dumps(FACTS))
        with pytest.raises(ValueError, match=said):
            load_parser(tmp_path / name, CPU)
    assert not (tmp_path / "written").exists()


def test_two_files_of_one_name_are_refused(tmp_path):
    file = save_module(tmp_path)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(archive.namelist()[0].upper(), "x")
    with pytest.raises(ValueError, match="two files of one name"):
        load_parser(file, CPU)


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """Weights of torchvision's smallest network, at random."""
    torch.manual_seed(0)
    how = {"weights": None, "weights_backbone": None, "num_classes": 21}
    network = models.get_model("lraspp_mobilenet_v3_large", **how).eval()
    file = tmp_path_factory.mktemp("voc") / "weights.pth"
    torch.save(network.state_dict(), file)
    return network, file


def test_torchvision_networks_are_prepared_as_published(voc, colours):
    network, file = voc
    name = f"torchvision:lraspp_mobilenet_v3_large={file}"
    loaded = load_parser(name, CPU)
    assert loaded.name == "torchvision:lraspp_mobilenet_v3_large"
    assert loaded.parser.class_names[:2] == ("background", "aeroplane")
    assert "cat" in loaded.parser.class_names
    preset = models.get_model_weights("lraspp_mobilenet_v3_large").DEFAULT.transforms()
    with torch.no_grad():
        expected = network(preset((colours + 1) / 2))["out"]
        found = loaded.parser.classify(colours)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    parser = load_content_parser(name, CPU, ("cat", "dog"))
    assert parser.content == "cat,dog"
    assert "torchvision lraspp_mobilenet_v3_large" in parser.protocol


def test_torchvision_names_and_files_are_checked(voc, tmp_path):
    with pytest.raises(ValueError, match="torchvision:yolo: unknown network; there are deeplabv3"):
        load_parser("torchvision:yolo", CPU)
    with pytest.raises(ValueError, match="no such file"):
        load_parser(f"torchvision:fcn_resnet50={tmp_path}/x.pth", CPU)
    with pytest.raises(ValueError, match=r"weights.pth lacks tensor|lacks|unexpected"):
        load_parser(f"torchvision:fcn_resnet50={voc[1]}", CPU)
    with pytest.raises(ValueError, match="no file after the"):
        load_parser("torchvision:fcn_resnet50=", CPU)


def test_a_parser_is_one_line_in_the_table(monkeypatch, colours):
    class Bright:
        class_names, classes_excluded, input_size = ("dark", "bright"), (0,), 32

        def classify(self, images):
            return (images.mean(1) > -0.5).long()

    kind = ParserKind(lambda argument, device: Loaded(Bright(), "bright", "brightness"), "bright")
    monkeypatch.setitem(PARSERS, "bright", kind)
    parser = load_content_parser("bright", CPU)
    assert isinstance(parser, ContentParser)
    assert parser(colours).mean() == 1
    assert parser.soft(colours).mean() == 1
    assert load_content_parser("bright", CPU, ("dark",))(colours).max() == 0


def config_of(file):
    return checkpoint.read(file)["config"]


def test_the_content_is_stored_and_matters(tmp_path, capsys):
    kept = {}
    for name in ("hair", "background", ""):
        out = tmp_path / f"{name}.pt"
        flags = f"--n_sample 10 --device cpu --out {out}".split()
        assert prune.main([*flags, *(["--content", name] if name else [])]) == 0
        kept[name] = checkpoint.read(out)["g"]["convs.0.conv.weight"]
        assert config_of(out)["content"] == (name or "all,-background,-cloth")
        assert config_of(out)["parser"] == bundled.PARSER.name
    assert not torch.equal(kept["hair"], kept["background"])
    assert "warning" not in capsys.readouterr().err


def test_prune_warns_of_next_to_nothing(tmp_path, capsys):
    flags = f"--n_sample 10 --device cpu --out {tmp_path}/x.pt --parser {FACES}"
    assert prune.main([*flags.split(), "--content", "eyes"]) == 0
    assert "prune.py: warning: the masks of l_eye,r_eye hold 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--content skn", "--content skn: the parser has no such class; did you mean skin"),
        ("--content skin,-skin", "--content skin,-skin: leaves no class"),
        ("--parser torchvision:x", "--parser_ckpt torchvision:x: unknown network"),
        ("--parser none --content hair", "--content hair: the parser has no such class"),
    ],
)
def test_bad_names_are_one_line(tmp_path, capsys, flags, said):
    assert prune.main(f"--n_sample 4 --device cpu --out {tmp_path}/x.pt {flags}".split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    toon_faces.main(f"--out {folder}/data --n 130 --no_labels".split())
    return folder


def protocol_of(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]


def test_figures_of_other_contents_are_not_compared(faces, capsys):
    flags = (
        f"--n_sample 120 --content_aware --device cpu --json --workers 0 --path {faces}/data/images"
    )
    flags = [*flags.split(), "--stats", f"{faces}/own.npz"]
    assert get_fid.main(flags) == 0
    own = protocol_of(capsys)
    assert get_fid.main([*flags, "--content", "all,-cloth,-background"]) == 0
    assert protocol_of(capsys) == own
    assert get_fid.main([*flags, "--content", "hair"]) == 2
    assert "content hair" in capsys.readouterr().err


def test_features_are_those_of_bisenet_alone(capsys):
    for features in ([], ["--features", "parser"]):
        assert get_fid.main(["--n_sample", "120", "--parser", "none", *features]) == 2
        line = capsys.readouterr().err
        assert "--parser_ckpt none: only the file of a BiSeNet parser has features" in line
