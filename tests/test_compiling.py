"""--compile and --cuda_graphs: the frozen networks, compiled by backends that only trace."""

import pytest
import torch

from Compression.content import ContentParser
from Compression.distillation import Term, pixels
from Compression.training import Teacher
from Evaluation import distances
from Model.face_parser import BiSeNet
from Model.generator import Generator
from tests.test_training import config, images, make_trainer
from Util import compiling


@pytest.fixture(params=["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", request.param)
    torch._dynamo.reset()


def iterate(mode):
    """Two iterations with a teacher, a parser and a perceptual network, compiled or not."""
    torch.manual_seed(5)
    generator = Generator(8, style_dim=8, n_mlp=2, channels=(6, 5, 4, 4)).requires_grad_(False)
    for layer in generator.styled_convs:
        layer.noise.weight.data.fill_(0.5)
    parser = BiSeNet(width=4, stem_stride=1, input_size=32).eval().requires_grad_(False)
    content = ContentParser(parser)
    network = distances.ParserDistance(parser)
    for owner, name in ((generator, "synthesis"), (parser, "class_map"), (network, "forward")):
        compiling.compile_method(owner, name, mode)

    def perceptual(student, teacher, mask):
        return network(student.made.image * mask, teacher.made.image * mask).mean()

    terms = [Term("l1", 3.0, pixels.term()), Term("parser", 3.0, perceptual)]
    settings = config(compile=True, r1=0.0, path_regularize=0.0)  # draws the teacher's noise
    trainer = make_trainer(settings, Teacher(generator, content, terms))
    torch.manual_seed(3)
    return [trainer.iterate(real) for real in images(2)]


def test_compiled_networks_compute_the_same(backend):
    for plain, found in zip(iterate(""), iterate("default"), strict=True):
        assert plain["kd_parser"] > 0
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_one_style_is_no_other_code_than_two():
    teacher, layouts = Generator(8, 8, 2, (6, 5, 4, 4)).requires_grad_(False), set()

    def look(student, target, mask):
        layouts.add(target.w_plus.stride())
        return student.made.image.mean()

    for mixing in (0.0, 1.0):
        settings = config(compile=True, r1=0.0, path_regularize=0.0, mixing=mixing)
        trainer = make_trainer(settings, Teacher(teacher, None, [Term("look", 1.0, look)]))
        trainer.iterate(images()[0])
    assert len(layouts) == 1


def test_cuda_graphs_are_asked_for_and_every_iteration_frees_their_results(monkeypatch):
    modes, begun = [], []
    compile_ = lambda method, **how: modes.append(how["mode"]) or method  # noqa: E731
    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(1))
    for graphs, mode in ((False, "default"), (True, "reduce-overhead")):
        settings = config(compile=True, cuda_graphs=graphs, r1=0.0, path_regularize=0.0)
        compiling.compile_method(
            Generator(8, style_dim=8, n_mlp=1), "w_plus", settings.compile_mode
        )
        assert modes.pop() == mode
        trainer = make_trainer(settings)
        for real in images(2):
            trainer.iterate(real)
        assert len(begun) == (2 if graphs else 0)
