"""Files in the layouts of NVIDIA's StyleGAN2s, and what their networks compute, in plain formulas.

The layouts are those of stylegan2-ada-pytorch, of stylegan3 and of the TensorFlow StyleGAN2. Every
file carries source code that leaves a trace if it is ever run.
"""

import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F

TRAP = "open('attacked', 'w').close()\nraise SystemExit('the source in the file was run')\n"
WIDTHS = {4: 6, 8: 5, 16: 4}
SIZE, W_DIM = 16, 8
FILTER = torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64


def _stub(module, **names):
    made = types.ModuleType(module)
    for name, value in names.items():
        value.__module__, value.__qualname__, value.__name__ = module, name, name
        setattr(made, name, value)
    return {module: made}


class EasyDict(dict):
    pass


class Network:
    """A TensorFlow network as it is pickled."""

    def __init__(self, variables, static_kwargs, components=None, version=4):
        self.__dict__.update(
            version=version,
            name="net",
            static_kwargs=static_kwargs,
            components=components or {},
            build_module_src=TRAP,
            build_func_name="build",
            variables=list(variables.items()),
        )


def _reconstruct(meta):
    raise AssertionError("a name in the file was called")


MODULES = {
    **{name: types.ModuleType(name) for name in ("torch_utils", "dnnlib", "dnnlib.tflib")},
    **_stub("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct),
    **_stub("dnnlib.util", EasyDict=EasyDict),
    **_stub("dnnlib.tflib.network", Network=Network),
}


class Part:
    """A persistent module: named parameters, buffers, modules and attributes."""

    def __init__(self, class_name, parameters=None, buffers=None, modules=None, **attributes):
        self.class_name, self.version = class_name, 6
        self.state = {
            "training": False,
            "_parameters": {k: torch.nn.Parameter(v) for k, v in (parameters or {}).items()},
            "_buffers": dict(buffers or {}),
            "_non_persistent_buffers_set": set(),
            "_modules": dict(modules or {}),
            "_init_args": (),
            "_init_kwargs": {},
            **attributes,
        }

    def __reduce__(self):
        meta = {"type": "class", "version": self.version, "module_src": TRAP}
        meta |= {"class_name": self.class_name, "state": self.state}
        return _reconstruct, (meta,)

    def part(self, path):
        return self.state["_modules"][path] if "." not in path else self._descend(path)

    def _descend(self, path):
        first, rest = path.split(".", 1)
        return self.state["_modules"][first].part(rest)


def write(path, content, protocol=pickle.HIGHEST_PROTOCOL):
    sys.modules.update(MODULES)
    try:
        path.write_bytes(pickle.dumps(content, protocol))
    finally:
        for name in MODULES:
            del sys.modules[name]
    return path


def dense(inputs, outputs, lr=1.0, activation="linear", bias=0.0):
    weight = torch.randn(outputs, inputs) / lr
    parameters = {"weight": weight, "bias": bias + 0.3 * torch.randn(outputs) / lr}
    gains = {"weight_gain": lr / np.sqrt(inputs), "bias_gain": lr}  # the first is np.float64
    return Part("FullyConnectedLayer", parameters, activation=activation, **gains)


def synthesis_layer(inputs, outputs, side, clamp):
    parameters = {
        "weight": torch.randn(outputs, inputs, 3, 3).to(memory_format=torch.channels_last)
    }
    parameters |= {"noise_strength": torch.randn(()), "bias": torch.randn(outputs)}
    buffers = {"resample_filter": FILTER.clone(), "noise_const": torch.randn(side, side)}
    modules = {"affine": dense(W_DIM, inputs, bias=1.0)}
    settings = {"use_noise": True, "activation": "lrelu", "conv_clamp": clamp}
    return Part("SynthesisLayer", parameters, buffers, modules, **settings)


def pytorch_generator(clamp=None, lr=0.01, n_mlp=3):
    blocks = {}
    for side, width in WIDTHS.items():
        parts = {"conv1": synthesis_layer(width, width, side, clamp)}
        if side > 4:
            parts["conv0"] = synthesis_layer(WIDTHS[side // 2], width, side, clamp)
        colours = {"weight": torch.randn(3, width, 1, 1), "bias": torch.randn(3)}
        affine = {"affine": dense(W_DIM, width, bias=1.0)}
        parts["torgb"] = Part("ToRGBLayer", colours, {}, affine, conv_clamp=clamp)
        const = {"const": torch.randn(width, 4, 4)} if side == 4 else {}
        buffers = {"resample_filter": FILTER.clone()}
        blocks[f"b{side}"] = Part("SynthesisBlock", const, buffers, parts, architecture="skip")
    layers = {f"fc{i}": dense(W_DIM, W_DIM, lr, "lrelu") for i in range(n_mlp)}
    mapping = Part("MappingNetwork", {}, {"w_avg": torch.randn(W_DIM)}, layers, c_dim=0)
    synthesis = Part("SynthesisNetwork", {}, {}, blocks, img_channels=3)
    parts = {"synthesis": synthesis, "mapping": mapping}
    generator = Part("Generator", {}, {}, parts, c_dim=0, z_dim=W_DIM, img_channels=3)
    generator.state["_init_kwargs"] = {
        **{"z_dim": W_DIM, "c_dim": 0, "w_dim": W_DIM, "img_resolution": SIZE, "img_channels": 3},
        "mapping_kwargs": EasyDict(num_layers=n_mlp),
        "synthesis_kwargs": EasyDict(channel_base=64, num_fp16_res=2, conv_clamp=clamp),
    }
    return generator


def as_stylegan3(generator):
    """The same network as stylegan3 stores it: its settings are not grouped."""
    kwargs = generator.state["_init_kwargs"]
    inner = kwargs.pop("synthesis_kwargs") | {"fused_modconv_default": "inference_only"}
    kwargs.update(inner)
    generator.state["_init_kwargs"] = EasyDict(kwargs)
    return generator


def conv_layer(inputs, outputs, kernel, clamp=None, linear=False):
    parameters = {"weight": torch.randn(outputs, inputs, kernel, kernel)}
    parameters |= {} if linear else {"bias": torch.randn(outputs)}
    settings = {"activation": "linear" if linear else "lrelu", "conv_clamp": clamp}
    return Part("Conv2dLayer", parameters, {"resample_filter": FILTER.clone()}, **settings)


def pytorch_discriminator(group=4, clamp=None):
    parts = {}
    for side in (16, 8):
        here, below = WIDTHS[side], WIDTHS[side // 2]
        modules = {
            "conv0": conv_layer(here, here, 3, clamp),
            "conv1": conv_layer(here, below, 3, clamp),
            "skip": conv_layer(here, below, 1, linear=True),
        }
        if side == SIZE:
            modules["fromrgb"] = conv_layer(3, here, 1, clamp)
        buffers = {"resample_filter": FILTER.clone()}
        block = Part("DiscriminatorBlock", {}, buffers, modules, architecture="resnet")
        parts[f"b{side}"] = block
    width = WIDTHS[4]
    last = {
        "mbstd": Part("MinibatchStdLayer", group_size=group, num_channels=1),
        "conv": conv_layer(width + 1, width, 3, clamp),
        "fc": dense(16 * width, width, activation="lrelu"),
        "out": dense(width, 1),
    }
    parts["b4"] = Part("DiscriminatorEpilogue", {}, {}, last, architecture="resnet", cmap_dim=0)
    discriminator = Part("Discriminator", {}, {}, parts, c_dim=0, img_channels=3)
    discriminator.state["_init_kwargs"] = {
        **{"c_dim": 0, "img_resolution": SIZE, "img_channels": 3, "channel_base": 64},
        **{"conv_clamp": clamp, "block_kwargs": {}, "mapping_kwargs": {}},
        "epilogue_kwargs": {"mbstd_group_size": group},
    }
    return discriminator


def pytorch_file(**changes):
    """What a training of stylegan2-ada-pytorch saves."""
    networks = {
        "G": pytorch_generator(),
        "D": pytorch_discriminator(),
        "G_ema": pytorch_generator(),
        "augment_pipe": Part("AugmentPipe", {}, {"p": torch.zeros(())}),
        "training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset"),
    }
    return networks | changes


def tensorflow_generator(n_mlp=3, seed=0, **kwargs):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    def styled(name, inputs, outputs, kernel=3, noise=True):
        made = {"weight": normal(kernel, kernel, inputs, outputs), "bias": normal(outputs)}
        made |= {"mod_weight": normal(W_DIM, inputs), "mod_bias": normal(inputs)}
        made |= {"noise_strength": np.float32(rng.standard_normal())} if noise else {}
        return {f"{name}/{key}": value for key, value in made.items()}

    mapping, synthesis = {}, {"4x4/Const/const": normal(1, WIDTHS[4], 4, 4)}
    for i in range(n_mlp):
        mapping[f"Dense{i}/weight"] = normal(W_DIM, W_DIM) * np.float32(100)
        mapping[f"Dense{i}/bias"] = normal(W_DIM) * np.float32(30)
    for i, side in enumerate((4, 8, 8, 16, 16)):
        synthesis[f"noise{i}"] = normal(1, 1, side, side)
    for side, width in WIDTHS.items():
        name = f"{side}x{side}"
        if side == 4:
            synthesis |= styled(f"{name}/Conv", width, width)
        else:
            synthesis |= styled(f"{name}/Conv0_up", WIDTHS[side // 2], width)
            synthesis |= styled(f"{name}/Conv1", width, width)
        synthesis |= styled(f"{name}/ToRGB", width, 3, 1, noise=False)
    settings = {"num_channels": 3, "resolution": SIZE, "label_size": 0, "fmap_base": 32} | kwargs
    repeated = settings | {"dlatent_broadcast": 2 * len(WIDTHS)}  # as G_main makes its mapping
    parts = {"synthesis": Network(synthesis, settings), "mapping": Network(mapping, repeated)}
    own = {"lod": np.float32(0), "dlatent_avg": normal(W_DIM)}
    return Network(own, settings, parts)


def tensorflow_discriminator(**kwargs):
    rng = np.random.default_rng(7)

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    made = {}
    for side in (16, 8):
        here, below, name = WIDTHS[side], WIDTHS[side // 2], f"{side}x{side}"
        if side == SIZE:
            made |= {f"{name}/FromRGB/weight": normal(1, 1, 3, here)}
            made |= {f"{name}/FromRGB/bias": normal(here)}
        for layer, outputs in (("Conv0", here), ("Conv1_down", below)):
            made[f"{name}/{layer}/weight"] = normal(3, 3, here, outputs)
            made[f"{name}/{layer}/bias"] = normal(outputs)
        made[f"{name}/Skip/weight"] = normal(1, 1, here, below)
    width = WIDTHS[4]
    made |= {"4x4/Conv/weight": normal(3, 3, width + 1, width), "4x4/Conv/bias": normal(width)}
    made |= {"4x4/Dense0/weight": normal(16 * width, width), "4x4/Dense0/bias": normal(width)}
    made |= {"Output/weight": normal(width, 1), "Output/bias": normal(1)}
    return Network(made, {"num_channels": 3, "resolution": SIZE, "label_size": 0} | kwargs)


def tensorflow_file():
    """What a training of the TensorFlow StyleGAN2 saves: G, D and Gs."""
    return tensorflow_generator(), tensorflow_discriminator(), tensorflow_generator(seed=1)


# What the networks compute, in float64, by the formulas of NVIDIA's code.


def resample(x, up=1, down=1, pad=(0, 0), gain=1.0):
    """upfirdn2d: insert zeros, pad, convolve with the flipped filter, drop samples."""
    n, c, height, width = x.shape
    zeros = x.new_zeros(n, c, height * up, width * up)
    zeros[:, :, ::up, ::up] = x
    zeros = F.pad(zeros, (*pad, *pad))
    taps = (FILTER.double() * gain).flip(0, 1)
    y = sum(
        taps[i, j] * zeros[:, :, i : zeros.shape[2] - 3 + i, j : zeros.shape[3] - 3 + j]
        for i in range(4)
        for j in range(4)
    )
    return y[:, :, ::down, ::down]


def lrelu(x):
    return torch.where(x > 0, x, 0.2 * x) * math.sqrt(2)


class PyTorchLayers:
    """A persistent network's tensors by role; weights (O, I, k, k) as a correlation has them."""

    def __init__(self, network):
        self.network = network

    def tensor(self, path):
        path, name = path.rsplit(".", 1)
        state = self.network.part(path).state
        found = state["_parameters"].get(name, state["_buffers"].get(name))
        return found.detach().double()

    def mapping(self, i):
        return self.tensor(f"mapping.fc{i}.weight"), self.tensor(f"mapping.fc{i}.bias")

    def const(self):
        return self.tensor("synthesis.b4.const")

    def styled(self, side, layer):
        name = f"synthesis.b{side}.{layer}"
        weight = self.tensor(f"{name}.weight")
        # flip_weight is (up == 1): layers that upsample convolve, others correlate.
        weight = weight.flip(2, 3) if layer == "conv0" else weight
        affine = self.tensor(f"{name}.affine.weight"), self.tensor(f"{name}.affine.bias")
        noise = 0
        if layer != "torgb":
            noise = self.tensor(f"{name}.noise_const") * self.tensor(f"{name}.noise_strength")
        return weight, *affine, noise, self.tensor(f"{name}.bias")

    def judge(self, side, layer):
        weight = self.tensor(f"b{side}.{layer}.weight")
        return weight, 0 if layer == "skip" else self.tensor(f"b{side}.{layer}.bias")


TENSORFLOW_NAMES = {"conv0": "Conv0_up", "conv1": "Conv1", "torgb": "ToRGB"}
TENSORFLOW_JUDGE = {"fromrgb": "FromRGB", "conv0": "Conv0", "conv1": "Conv1_down", "skip": "Skip"}
TENSORFLOW_JUDGE |= {"conv": "Conv", "fc": "Dense0"}


class TensorFlowLayers:
    """The same of a TensorFlow network, whose weights are (k, k, I, O) and (in, out)."""

    def __init__(self, network):
        self.values = dict(network.variables)
        for name, part in network.components.items():
            self.values |= {f"{name}/{key}": value for key, value in part.variables}

    def tensor(self, name):
        return torch.tensor(self.values[name]).double()

    def mapping(self, i):
        return self.tensor(f"mapping/Dense{i}/weight").T, self.tensor(f"mapping/Dense{i}/bias")

    def const(self):
        return self.tensor("synthesis/4x4/Const/const")[0]

    def styled(self, side, layer):
        own = "Conv" if (side, layer) == (4, "conv1") else TENSORFLOW_NAMES[layer]
        name = f"synthesis/{side}x{side}/{own}"
        affine = self.tensor(f"{name}/mod_weight").T, self.tensor(f"{name}/mod_bias") + 1
        noise = 0
        if layer != "torgb":
            index = 2 * int(math.log2(side)) - (5 if layer == "conv0" else 4)
            noise = self.tensor(f"synthesis/noise{index}") * self.tensor(f"{name}/noise_strength")
        weight = self.tensor(f"{name}/weight").permute(3, 2, 0, 1)
        return weight, *affine, noise, self.tensor(f"{name}/bias")

    def judge(self, side, layer):
        name = "Output" if layer == "out" else f"{side}x{side}/{TENSORFLOW_JUDGE[layer]}"
        weight = self.tensor(f"{name}/weight")
        weight = weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight.T
        return weight, 0 if layer == "skip" else self.tensor(f"{name}/bias")


def plain_mapping(layers, z, n_mlp=3, lr=0.01):
    x = z.double()
    x = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(n_mlp):
        weight, bias = layers.mapping(i)
        x = lrelu(x @ (weight * lr / math.sqrt(weight.shape[1])).T + bias * lr)
    return x


def plain_styled(layers, x, w, side, layer):
    """Modulate, demodulate and convolve image by image; noise, bias, activation."""
    weight, affine, affine_bias, noise, bias = layers.styled(side, layer)
    style = w @ (affine / math.sqrt(len(w[0]))).T + affine_bias
    outputs = []
    for image, scale in zip(x, style, strict=True):
        kernel = weight * scale[:, None, None]
        if layer == "torgb":
            kernel = kernel / math.sqrt(weight.shape[1])
        else:
            kernel = kernel / math.sqrt(weight[0].numel())  # cancelled but for the 1e-8
            norm = (kernel.square().sum((1, 2, 3)) + 1e-8).sqrt()
            kernel = kernel / norm[:, None, None, None]
        image = image[None]
        if layer == "conv0":  # upsample, filter (gain 4), then convolve
            image = F.conv2d(resample(image, up=2, pad=(3, 2), gain=4.0), kernel)
        else:
            image = F.conv2d(image, kernel, padding=weight.shape[-1] // 2)
        outputs.append(image)
    y = torch.cat(outputs) + noise + bias[:, None, None]
    return y if layer == "torgb" else lrelu(y)


def plain_images(layers, z, lr=0.01):
    """Images of the stored noise (noise_mode='const'), (N, 3, 16, 16)."""
    w = plain_mapping(layers, z, lr=lr)
    x, rgb = layers.const().repeat(len(z), 1, 1, 1), 0
    for side in WIDTHS:
        if side > 4:
            x = plain_styled(layers, x, w, side, "conv0")
            rgb = resample(rgb, up=2, pad=(2, 1), gain=4.0)
        x = plain_styled(layers, x, w, side, "conv1")
        rgb = rgb + plain_styled(layers, x, w, side, "torgb")
    return rgb


def plain_logits(layers, images, group=4):
    """Logits of a discriminator, (N, 1)."""

    def conv(x, side, layer, **options):
        weight, bias = layers.judge(side, layer)
        y = F.conv2d(x, weight / math.sqrt(weight[0].numel()), **options)
        return y if layer == "skip" else lrelu(y + bias[:, None, None])

    x = conv(images.double(), SIZE, "fromrgb")
    for side in (16, 8):
        skip = conv(resample(x, down=2, pad=(1, 1)), side, "skip")
        y = conv(x, side, "conv0", padding=1)
        y = conv(resample(y, pad=(2, 2)), side, "conv1", stride=2)
        x = (y + skip) * math.sqrt(0.5)
    x = conv(torch.cat([x, spread(x, group)], dim=1), 4, "conv", padding=1).flatten(1)
    for layer in ("fc", "out"):
        weight, bias = layers.judge(4, layer)
        x = x @ (weight / math.sqrt(weight.shape[1])).T + bias
        x = lrelu(x) if layer == "fc" else x
    return x


def spread(x, group):
    """The minibatch standard deviation as a map, (N, 1, 4, 4), group by group."""
    n = len(x)
    size = min(group, n)
    maps = x.new_zeros(n, 1, 4, 4)
    for first in range(n // size):
        members = list(range(first, n, n // size))
        deviation = (x[members].var(dim=0, unbiased=False) + 1e-8).sqrt().mean()
        maps[members] = deviation
    return maps
