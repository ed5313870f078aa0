import functools
import io
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from PIL import Image

import prune
import train
from Model import checkpoint, nvidia
from Model.checkpoint import CheckpointError, load_discriminator, load_generator
from Model.nvidia.__main__ import main
from tests.nvidia_files import (
    SIZE,
    W_DIM,
    Network,
    Part,
    PyTorchLayers,
    TensorFlowLayers,
    as_stylegan3,
    plain_images,
    plain_logits,
    plain_mapping,
    pytorch_discriminator,
    pytorch_file,
    pytorch_generator,
    tensorflow_discriminator,
    tensorflow_file,
    tensorflow_generator,
    write,
)


@pytest.fixture(autouse=True)
def _no_trace(tmp_path, monkeypatch):
    """Source in a file would leave a trace in the current folder."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "attacked").exists()


def stylegan3_file():
    return pytorch_file(**{k: as_stylegan3(pytorch_generator()) for k in ("G", "G_ema")})


def networks_of(content):
    """G, D and G_ema of a file of either framework, as what tells their tensors."""
    if isinstance(content, tuple):
        return tuple(map(TensorFlowLayers, content))
    return tuple(PyTorchLayers(content[name]) for name in ("G", "D", "G_ema"))


# What makes a file's content, and the protocol that its framework writes.
FILES = {
    "ada": (pytorch_file, 3),
    "stylegan3": (stylegan3_file, 4),
    "tensorflow": (tensorflow_file, 4),
}


def assert_equal_to_peak(found, expected, tolerance=1e-4):
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("origin", FILES)
@torch.no_grad()
def test_networks_compute_what_nvidias_do(tmp_path, origin):
    make, protocol = FILES[origin]
    content = make()
    path = write(tmp_path / "network.pkl", content, protocol)
    raw, judge, average = networks_of(content)
    read = checkpoint.read(path)
    assert set(read) == {"g", "g_ema", "d", "latent_avg"}
    z, images = torch.randn(3, W_DIM), torch.randn(8, 3, SIZE, SIZE)
    for key, layers in (("g", raw), ("g_ema", average)):
        generator = load_generator(path, key)
        assert generator.channels == (6, 6, 5, 5, 4, 4)
        assert_equal_to_peak(generator.mapping(z), plain_mapping(layers, z))
        found = generator([z], randomize_noise=False)
        assert_equal_to_peak(found, plain_images(layers, z))
    assert_equal_to_peak(load_discriminator(path)(images), plain_logits(judge, images))
    name = "dlatent_avg" if origin == "tensorflow" else "mapping.w_avg"
    assert torch.equal(read["latent_avg"].double(), average.tensor(name))


def test_drawn_noise_has_the_strength_of_the_file(tmp_path):
    content = pytorch_file()
    generator = load_generator(write(tmp_path / "a.pkl", content))
    for i, name in enumerate(("b4.conv1", "b8.conv0", "b8.conv1", "b16.conv0", "b16.conv1")):
        part = content["G_ema"].part(f"synthesis.{name}").state
        strength = part["_parameters"]["noise_strength"]
        assert generator.styled_convs[i].noise.weight.item() == strength.item()
        assert torch.equal(generator.fixed_noise[i][0, 0], part["_buffers"]["noise_const"])


@torch.no_grad()
def test_another_learning_rate_multiplier_is_in_the_stored_values(tmp_path):
    z = torch.randn(2, W_DIM)
    made = pytorch_generator(lr=0.1)
    generator = load_generator(write(tmp_path / "a.pkl", {"G_ema": made}))
    assert_equal_to_peak(generator.mapping(z), plain_mapping(PyTorchLayers(made), z, lr=0.1))
    made = tensorflow_generator(mapping_lrmul=0.02)
    generator = load_generator(write(tmp_path / "b.pkl", made))
    assert_equal_to_peak(generator.mapping(z), plain_mapping(TensorFlowLayers(made), z, lr=0.02))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_any_protocol_and_files_of_one_network(tmp_path, protocol):
    if protocol > 2:  # protocol 2 has no bytes of its own, and nobody writes it
        path = write(tmp_path / "a.pkl", {"G_ema": pytorch_generator()}, protocol)
        assert set(checkpoint.read(path)) == {"g_ema", "latent_avg"}
        path = write(tmp_path / "b.pkl", tensorflow_generator(), protocol)
        assert set(checkpoint.read(path)) == {"g_ema", "latent_avg"}
    else:
        path = write(tmp_path / "b.pkl", tensorflow_generator(), protocol)
        with pytest.raises(CheckpointError, match=r"names _codecs\.encode"):
            checkpoint.read(path)


def test_arrays_of_other_layouts_are_read_as_they_are(tmp_path):
    made = tensorflow_generator()
    values = dict(made.components["mapping"].variables)
    expected = values["Dense0/weight"].copy()
    for change in (np.asfortranarray, lambda a: a.astype(">f4"), lambda a: a.astype("f8")):
        made.components["mapping"].variables = list(
            (values | {"Dense0/weight": change(expected)}).items()
        )
        state = checkpoint.read(write(tmp_path / "a.pkl", made))["g_ema"]
        np.testing.assert_array_equal(state["style.1.weight"].numpy(), expected.T)


def edited(path=None, kwargs=None, network="G_ema", buffers=None, parameters=None, **attributes):
    """An ADA file, one part of which was changed."""
    content = pytorch_file()
    part = content[network].part(path) if path else content[network]
    part.state |= attributes
    part.state["_buffers"] |= buffers or {}
    part.state["_parameters"] |= parameters or {}
    part.state["_init_kwargs"] |= kwargs or {}
    return content


def without(path, group, name, network="G_ema"):
    content = pytorch_file()
    del content[network].part(path).state[group][name]
    return content


def versioned(version):
    content = pytorch_file()
    content["G_ema"].version = version
    return content


def of_stylegan3():
    layers = {"input": Part("SynthesisInput", {"weight": torch.zeros(4, 4)})}
    synthesis = Part("SynthesisNetwork", {}, {}, layers)
    return {"G_ema": Part("Generator", {}, {}, {"synthesis": synthesis}, c_dim=0)}


def looped():
    content = pytorch_file()
    synthesis = content["G_ema"].part("synthesis")
    synthesis.state["_modules"]["again"] = content["G_ema"].part("mapping")
    return content


def repeated():
    content = pytorch_file()
    layer = content["G_ema"].part("synthesis.b8.conv1").state["_parameters"]
    content["G_ema"].part("synthesis.b4.conv1").state["_parameters"]["bias"] = layer["weight"]
    content["G_ema"].part("synthesis.b16.conv1").state["_parameters"]["bias"] = layer["weight"]
    return content


def tensorflow(version=4, components=None, variables=None, **kwargs):
    made = tensorflow_generator(**kwargs)
    made.version = version
    made.components |= components or {}
    made.variables += (variables or {}).items()
    return made


def tensorflow_judge(**kwargs):
    return tensorflow_generator(), tensorflow_discriminator(**kwargs), tensorflow_generator()


HAAR = torch.zeros(4, 4)
HAAR[1:3, 1:3] = 0.25
SYNTHESIS = {"synthesis_kwargs": {"architecture": "resnet"}}
REFUSED = {
    "labels": (lambda: edited(c_dim=10), "c_dim is 10, not 0: networks conditioned on class"),
    "labels in kwargs": (lambda: edited(kwargs={"c_dim": 10}), "c_dim is 10, not 0"),
    "labels of D": (lambda: edited(network="D", c_dim=10), "D is unsupported: c_dim is 10"),
    "residual G": (
        lambda: edited("synthesis.b8", architecture="resnet"),
        "G_ema is unsupported: architecture is 'resnet', not 'skip'",
    ),
    "residual G in kwargs": (lambda: edited(kwargs=SYNTHESIS), "architecture is 'resnet'"),
    "plain G": (lambda: edited("synthesis.b8", architecture="orig"), "'orig', not 'skip'"),
    "plain D": (
        lambda: edited("b8", network="D", architecture="orig"),
        "D is unsupported: architecture is 'orig', not 'resnet'",
    ),
    "D with skips": (lambda: edited("b4", network="D", architecture="skip"), "is 'skip', not"),
    "filter": (
        lambda: edited("synthesis.b8.conv0", buffers={"resample_filter": HAAR}),
        r"synthesis\.b8\.conv0\.resample_filter is not made of \[1, 3, 3, 1\]",
    ),
    "1-D filter": (
        lambda: edited("b16.conv1", network="D", buffers={"resample_filter": torch.ones(12) / 12}),
        r"b16\.conv1\.resample_filter is not made of",
    ),
    "filter in kwargs": (
        lambda: edited(network="D", kwargs={"block_kwargs": {"resample_filter": [1, 1]}}),
        r"resample_filter is \[1, 1\], not \[1, 3, 3, 1\]",
    ),
    "activation": (
        lambda: edited("synthesis.b4.conv1", activation="relu"),
        "activation is 'relu', not 'lrelu'",
    ),
    "activation of the mapping": (lambda: edited("mapping.fc0", activation="linear"), "activation"),
    "grey images": (lambda: edited(img_channels=1), "img_channels is 1, not 3: .* three colours"),
    "no noise": (lambda: edited("synthesis.b8.conv1", use_noise=False), "use_noise is False"),
    "more maps": (
        lambda: edited("b4.mbstd", network="D", num_channels=2),
        "mbstd_num_channels is 2, not 1",
    ),
    "a strange group": (lambda: edited("b4.mbstd", network="D", group_size=0), "group_size is 0"),
    "a strange clamp": (lambda: edited("synthesis.b8.conv1", conv_clamp=-1), "conv_clamp is -1"),
    "a strange multiplier": (lambda: edited("mapping.fc0", bias_gain=0.0), "lr_multiplier"),
    "an unknown setting": (
        lambda: edited(kwargs={"init_res": [4, 6]}),
        r"built with init_res=\[4, 6\], a setting of no published StyleGAN2",
    ),
    "grouped twice": (
        lambda: edited(kwargs={"synthesis_kwargs": {"more_kwargs": {}}}),
        "built with more_kwargs=",
    ),
    "a further tensor": (
        lambda: edited("mapping", parameters={"scale": torch.ones(3)}),
        r"it has a tensor mapping\.scale, which no StyleGAN2 has",
    ),
    "a missing tensor": (
        lambda: without("synthesis.b8.conv0", "_parameters", "bias"),
        r"it lacks the tensor synthesis\.b8\.conv0\.bias",
    ),
    "no synthesis": (
        lambda: without("synthesis", "_modules", "b16") | {"G": pytorch_generator(n_mlp=0)},
        r"G is unsupported: it lacks the tensor mapping\.fc0\.weight",
    ),
    "wide latents": (
        lambda: edited("mapping.fc0", parameters={"weight": torch.zeros(W_DIM, 2 * W_DIM)}),
        r"a layer of \(8, 16\); here z, w and",
    ),
    "an odd mean": (
        lambda: edited("mapping", buffers={"w_avg": torch.zeros(3)}),
        r"its mean w has shape \(3,\)",
    ),
    "an odd colour bias": (
        lambda: edited("synthesis.b8.torgb", parameters={"bias": torch.zeros(4)}),
        r"tensor synthesis\.b8\.torgb\.bias has shape \(4,\)",
    ),
    "StyleGAN3": (of_stylegan3, "a StyleGAN3 generator"),
    "another class": (
        lambda: pytorch_file(G_ema=Part("TriPlaneGenerator", {}, {}, {})),
        "a network of class 'TriPlaneGenerator', not Generator",
    ),
    "a later format": (lambda: versioned(7), "version 7 of the format, not 6"),
    "no network": (lambda: pytorch_file(D=3), "D is unsupported: int instead of a network"),
    "one part twice": (looped, r"damaged: its part synthesis\.again is no module of its own"),
    "values repeated": (repeated, "claim more values than are stored"),
    "a number for a tensor": (
        lambda: edited("mapping", buffers={"w_avg": 3}),
        r"mapping\.w_avg is int, no tensor",
    ),
    "TF: labels": (lambda: tensorflow(label_size=5), "label_size is 5, not 0"),
    "TF: residual G": (lambda: tensorflow(architecture="resnet"), "architecture is 'resnet'"),
    "TF: filter": (lambda: tensorflow(resample_kernel=(1, 2, 1)), r"kernel is \(1, 2, 1\)"),
    "TF: no filter": (lambda: tensorflow(resample_kernel=None), "resample_kernel is None"),
    "TF: relu": (lambda: tensorflow(nonlinearity="relu"), "nonlinearity is 'relu'"),
    "TF: raw latents": (lambda: tensorflow(normalize_latents=False), "normalize_latents is False"),
    "TF: grey images": (lambda: tensorflow(num_channels=1), "num_channels is 1"),
    "TF: configuration D": (
        lambda: tensorflow(synthesis_func="G_synthesis_stylegan_revised"),
        "only configurations E and F",
    ),
    "TF: a growing network": (
        lambda: tensorflow(variables={"synthesis/ToRGB_lod3/weight": np.zeros((1, 1, 3, 3))}),
        "ToRGB_lod3/weight is of configurations A to D",
    ),
    "TF: an old format": (lambda: tensorflow(version=3), "version 3 of the format"),
    "TF: an unknown setting": (lambda: tensorflow(spectral=True), "built with spectral=True"),
    "TF: plain D": (lambda: tensorflow_judge(architecture="orig"), "D is unsupported: arch"),
    "TF: no group": (lambda: tensorflow_judge(mbstd_group_size=0), "mbstd_group_size is 0"),
    "TF: no component": (lambda: tensorflow(components={"mapping": 3}), "component mapping/"),
    "TF: another variable": (
        lambda: tensorflow(variables={"pl_mean": np.float32(0)}),
        "it has a tensor pl_mean",
    ),
}


class Run:
    """Asks for a call when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def a_storage(values=3, written=3, held=3, magic=0x1950A86A20F9469CFC6C, kind="FloatStorage"):
    """A storage as PyTorch's old format has it, with claims of one's choice."""
    file = io.BytesIO()
    for item in (magic, 1001, {"little_endian": True}):
        pickle.dump(item, file, 2)
    # ("storage", torch.<kind>, "0", "cpu", values, None) as a persistent id
    file.write(b"\x80\x02(" + b"X\x07\x00\x00\x00storage" + b"ctorch\n" + kind.encode() + b"\n")
    file.write(b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu")
    file.write(pickle.dumps(values, 2)[2:-1] + b"NtQ.")
    pickle.dump(["0"], file, 2)
    file.write(struct.pack("<q", written) + bytes(4 * held))
    return file.getvalue()


def a_tensor(raw=None, offset=0, size=(3,), stride=(1,)):
    storage = Run(torch.storage._load_from_bytes, raw or a_storage())
    return Run(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)


def an_array(shape, raw=bytes(12), code="f4"):
    class Held:
        def __reduce__(self):
            state = (1, shape, np.dtype(code), False, raw)
            return np.empty(0).__reduce__()[0], (np.ndarray, (0,), b"b"), state

    return Held()


def with_buffer(value):
    return lambda: edited("mapping", buffers={"w_avg": value})


def with_variable(value):
    return lambda: tensorflow(variables={"x": value})


BIG = 2**40
HOSTILE = {
    "a system call": (
        lambda: edited(note=Run(os.system, "touch attacked")),
        r"names posix\.system",
    ),
    "eval": (lambda: {"G_ema": Run(eval, "open('attacked', 'w')")}, r"names builtins\.eval"),
    "exec in D": (lambda: pytorch_file(D=Run(exec, "open('attacked', 'w')")), r"builtins\.exec"),
    "getattr": (lambda: [Run(getattr, "x", "upper")], r"names builtins\.getattr"),
    "partial": (lambda: edited(c_dim=Run(functools.partial, print)), "functools"),
    "a class": (lambda: {"G_ema": torch.nn.Linear(1, 1)}, r"names torch\.nn\.modules"),
    "torch.load": (lambda: {"G_ema": Run(torch.load, "x")}, r"names torch\.serialization\.load"),
    "objects in an array": (lambda: {"x": np.array([Run(os.system, "x")])}, r"posix\.system"),
    "a storage's class": (
        with_buffer(a_tensor(a_storage(kind="_C._crash"))),
        r"names torch\._C\._crash",
    ),
    "a large storage": (
        with_buffer(a_tensor(a_storage(BIG, BIG))),
        "claims 1099511627776 values and holds 12",
    ),
    "a storage cut off": (with_buffer(a_tensor(a_storage(9, 9))), "claims 9 values"),
    "two counts": (with_buffer(a_tensor(a_storage(3, 9))), "claims 3 values"),
    "no storage": (with_buffer(a_tensor(a_storage(magic=3))), "that PyTorch did not write"),
    "a large tensor": (with_buffer(a_tensor(size=(BIG,))), "claims shape .*, 3 values are stored"),
    "a repeated value": (with_buffer(a_tensor(size=(BIG,), stride=(0,))), "claims shape"),
    "past the end": (with_buffer(a_tensor(offset=1)), "claims shape"),
    "before the start": (with_buffer(a_tensor(offset=-1)), "a tensor without a storage"),
    "odd strides": (with_buffer(a_tensor(stride=(1, 1))), "not a whole pickle"),
    "a large array": (with_variable(an_array((BIG,))), "array claims shape .* holds 3 values"),
    "an odd array": (with_variable(an_array((3,), code="V4")), "an array of type 'V4'"),
    "text for a number": (with_variable("x"), "G_ema is damaged"),
    "no pairs": (lambda: Network({}, {}, {}), "it lacks the tensor synthesis/"),
    "a list": (lambda: [1, 2], "no generator of NVIDIA's .* it holds list"),
    "other networks": (lambda: {"model": 3}, "no generator of NVIDIA's .* it holds model"),
    "no module": (lambda: edited(_modules=3), "damaged: int instead of a dict"),
    "no state": (
        lambda: {"G_ema": Part("Generator")} | {"G": Run(Part("G").__reduce__()[0], {})},
        "not a whole pickle",
    ),
}


@pytest.mark.parametrize("what", REFUSED | HOSTILE)
def test_what_is_hostile_or_cannot_be_converted_exactly_is_refused(tmp_path, what):
    make, message = (REFUSED | HOSTILE)[what]
    path = write(tmp_path / "network.pkl", make())
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.read(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("origin", FILES)
@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
def test_files_that_were_cut_off_are_refused(tmp_path, origin, part):
    make, protocol = FILES[origin]
    data = write(tmp_path / "a.pkl", make(), protocol).read_bytes()
    (tmp_path / "a.pkl").write_bytes(data[: int(part * len(data))])
    with pytest.raises(CheckpointError, match=r"a\.pkl: not a whole pickle of NVIDIA's"):
        checkpoint.read(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04N" + b"r" + struct.pack("<I", 2**31 - 1) + b".",  # a memo of 16 GiB
        b"\x80\x04\x8e" + struct.pack("<Q", 2**50) + b"x.",  # bytes that are not there
        b"\x80\x04\x95" + struct.pack("<Q", 2**50) + b"N.",  # a frame that is not there
        b"\x80\x05\x96" + struct.pack("<Q", 2**50) + b"x.",
    ],
)
def test_claims_of_a_pickle_take_no_memory(tmp_path, data):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(CheckpointError, match="not a whole pickle"):
        checkpoint.read(tmp_path / "a.pkl")


def test_pytorchs_own_pickles_are_not_taken_for_nvidias(tmp_path):
    content = {"g_ema": {"x": torch.zeros(3)}}
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(content, tmp_path / "new.pt")
    for name in ("old.pt", "new.pt"):
        assert not nvidia.is_pickle(tmp_path / name)
        assert torch.equal(checkpoint.read(tmp_path / name)["g_ema"]["x"], torch.zeros(3))


def converted(path, capsys, *flags):
    assert main([str(path), str(path.with_suffix(".pt")), *flags]) == 0
    return capsys.readouterr().out


def test_a_clamp_that_acts_is_a_note_and_one_that_does_not_is_none(tmp_path, capsys):
    quiet = {"G_ema": pytorch_generator(clamp=256), "D": pytorch_discriminator(clamp=256)}
    path = write(tmp_path / "quiet.pkl", quiet)
    assert "clamped" not in converted(path, capsys)
    with pytest.warns(UserWarning, match="trained with activations clamped to 256"):
        checkpoint.read(path)
    for layer in ("b8.conv1", "b16.torgb"):
        loud = {"G_ema": pytorch_generator(clamp=256)}
        loud["G_ema"].part(f"synthesis.{layer}").state["_parameters"]["bias"].data += 300
        text = converted(write(tmp_path / "loud.pkl", loud), capsys)
        assert re.search(r"clamped to 256 and they reach \d{3,}", text)
    loud = {"G_ema": pytorch_generator(clamp=256), "D": pytorch_discriminator(clamp=256)}
    loud["D"].part("b8.conv0").state["_parameters"]["bias"].data += 300
    path = write(tmp_path / "loud.pkl", loud)
    assert "clamped to 256" in converted(path, capsys)
    skip = {"G_ema": pytorch_generator(clamp=256), "D": pytorch_discriminator(clamp=256)}
    skip["D"].part("b8.skip").state["_parameters"]["weight"].data *= 1e4
    assert "clamped to 256" in converted(write(tmp_path / "skip.pkl", skip), capsys)
    assert "clamped" not in converted(path, capsys, "--n_sample", "0")


@pytest.mark.parametrize("group", [8, None])
@torch.no_grad()
def test_another_group_of_the_minibatch_is_a_warning(tmp_path, group):
    judge = pytorch_discriminator(group)
    path = write(tmp_path / "a.pkl", {"G_ema": pytorch_generator(), "D": judge})
    with pytest.warns(UserWarning, match="groups of (8|the whole batch)"):
        read = checkpoint.read(path)
    images = torch.randn(8, 3, SIZE, SIZE)
    layers, found = PyTorchLayers(judge), load_discriminator(read)
    assert_equal_to_peak(found(images[:4]), plain_logits(layers, images[:4], group or 4))
    expected = plain_logits(layers, images, group or 8)
    assert (found(images) - expected).abs().max() > 1e-4 * expected.abs().max()


def test_the_script_converts(tmp_path, capsys):
    source = write(tmp_path / "in.pkl", pytorch_file(D=pytorch_discriminator(8)))
    target = tmp_path / "new/out.pt"
    assert main([str(source), str(target)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"g_ema: generator, 16 px, latents of 8, 3 mapping layers, channels 6, 6", out)
    assert "d: discriminator, 16 px" in out
    assert "latent_avg" in out
    assert "note: its discriminator compares images in groups of 8" in out
    assert f"saved {target}" in out
    with pytest.warns(UserWarning, match="groups of 8"):
        direct = checkpoint.read(source)
    torch.testing.assert_close(checkpoint.read(target), direct, rtol=0, atol=0)
    assert not nvidia.is_pickle(target)


def test_a_generator_without_its_unsupported_discriminator(tmp_path, capsys):
    content = edited("b8", network="D", architecture="orig")
    source, target = write(tmp_path / "cifar.pkl", content), tmp_path / "out.pt"
    assert main([str(source), str(target)]) == 2
    assert "architecture is 'orig'" in capsys.readouterr().err
    assert main([str(source), str(target), "--discriminator", "False"]) == 0
    assert set(checkpoint.read(target)) == {"g", "g_ema", "latent_avg"}


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("none.pkl", "out.pt", r"none\.pkl: no such file"),
        ("text.pkl", "out.pt", r"text\.pkl: no pickle of NVIDIA's"),
        ("in.pkl", "in.pkl", r"in\.pkl: cannot be the result"),
        ("in.pkl", "folder", "folder: cannot be the result"),
        ("narrow.pkl", "out.pt", r"narrow\.pkl: .*g_ema: conv1\.conv\.weight has shape"),
    ],
)
def test_the_script_refuses_in_one_line(tmp_path, capsys, source, target, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.pkl").write_text("<html>")
    write(tmp_path / "in.pkl", pytorch_file())
    narrow = {"weight": torch.zeros(6, 3, 3, 3)}
    write(tmp_path / "narrow.pkl", edited("synthesis.b4.conv1", parameters=narrow))
    assert main([str(tmp_path / source), str(tmp_path / target)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "out.pt").exists()
    assert nvidia.is_pickle(tmp_path / "in.pkl")


def test_the_help_says_that_there_is_no_way_back(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "python -m Model.nvidia ffhq.pkl" in out
    assert "no way back" in out


def test_prune_takes_a_pickle(tmp_path, capsys):
    path, out = write(tmp_path / "full.pkl", pytorch_file()), tmp_path / "small.pt"
    flags = "--metric l1_out --remove_ratio 0.5 --n_sample 2 --device cpu"
    assert prune.main([*flags.split(), "--ckpt", str(path), "--out", str(out)]) == 0
    assert load_generator(out).channels == (3, 3, 3, 3, 2, 2)
    full = checkpoint.read(path)["d"]
    for name, value in load_discriminator(out).state_dict().items():
        assert torch.equal(value, full[name])


def test_train_takes_pickles(tmp_path):
    (tmp_path / "data").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{i}.png")
    path = write(tmp_path / "full.pkl", tensorflow_file())
    flags = f"--path {tmp_path}/data --out {tmp_path}/run --iter 1 --batch_size 2 --workers 0"
    flags += " --device cpu --content_aware_KD False --kd_lpips_lambda 0"
    assert train.main([*flags.split(), "--ckpt", str(path), "--teacher_ckpt", str(path)]) == 0
    (saved,) = (tmp_path / "run/checkpoints").glob("*.pt")
    assert load_generator(saved).channels == (6, 6, 5, 5, 4, 4)


def test_a_hostile_pickle_as_checkpoint_ends_a_script_in_one_line(tmp_path, capsys):
    path = write(tmp_path / "evil.pkl", edited(note=Run(os.system, "touch attacked")))
    flags = ["--metric", "l1_out", "--device", "cpu", "--out", str(tmp_path / "x.pt")]
    assert prune.main(["--ckpt", str(path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "posix.system" in line
    assert str(path) in line
