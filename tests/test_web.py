"""The page that runs the bundled models: its latents, and in a real browser its pictures."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from Evaluation import sampling
from Evaluation.directions import components_of
from Model import checkpoint
from tests.browser import BINARY, DRIVER, browser, served
from Util.pictures import to_uint8
from web import build

MISSING = [
    name
    for name, found in {
        "chromium": BINARY,
        "chromedriver": DRIVER,
        "npm": shutil.which("npm"),
    }.items()
    if not found
]
IDLE = "document.body.dataset.state === 'idle'"
PIXELS = """
    const canvas = document.querySelector(`#${arguments[0]} canvas`);
    const {data} = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
    return Array.from(data);
"""


def test_matching_directions_follow_the_other_space():
    w = torch.randn(500, 6) * torch.arange(6, 0, -1)
    found = components_of(w)
    directions = (found.components * found.deviations[:, None])[:3]
    linear = torch.randn(6, 4)
    found = build.matching_directions(w, w @ linear + 2, directions)
    torch.testing.assert_close(found, directions @ linear, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_latent", [4, 10, 18])
def test_layer_groups_cover_all_layers_once(n_latent):
    layers = [i for first, end in build.layer_groups(n_latent).values() for i in range(first, end)]
    assert layers == list(range(n_latent))


def test_other_files_stay(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert build.main(["--out", str(tmp_path)]) == 2
    assert "--out" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_page_that_was_not_finished_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "check_packages", lambda: None)
    monkeypatch.setattr(build, "copy_runtime", lambda folder: folder.mkdir(exist_ok=True))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_model", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            build.build(build.WebSettings(out=tmp_path / "dist"))
    assert not (tmp_path / "dist/data.json").exists()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    if MISSING:
        pytest.skip(f"the page is not tested without {', '.join(MISSING)}")
    folder = tmp_path_factory.mktemp("page")
    command = [sys.executable, "-m", "web.build", "--out", str(folder), "--n_faces", "10"]
    subprocess.run(command, check=True, cwd=build.HERE.parent)
    return folder


@pytest.fixture
def window(page, tmp_path):
    with served(page) as address, browser(tmp_path / "profile", "--disable-gpu") as window:
        window.open(address)
        window.wait("['idle', 'error'].includes(document.body.dataset.state)")
        yield window


def pictures_of(face: int, psi: float, mix: tuple[int, range] | None = None) -> dict:
    """What PyTorch makes of the page's faces, by model."""
    pictures = {}
    for name, file in build.MODELS.items():
        generator = checkpoint.load_generator(file).requires_grad_(False)
        centre = sampling.mean_latent(generator, seed=0)
        z = sampling.draw_z(generator, [face, mix[0] if mix else face], seed=0)
        first, second = generator.w_plus([z], truncation=psi, truncation_latent=centre).clone()
        if mix:
            first[mix[1].start : mix[1].stop] = second[mix[1].start : mix[1].stop]
        images = generator([first[None]], input_is_latent=True, randomize_noise=False)
        pictures[name] = to_uint8(images)[0]
    return pictures


def assert_shows(window, expected: dict) -> None:
    for name, picture in expected.items():
        found = np.array(window.run(PIXELS, name), dtype=int).reshape(*picture.shape[:2], 4)
        assert np.abs(found[:, :, :3] - picture).max() <= 2
        assert (found[:, :, 3] == 255).all()


def choose(window, selector: str, value: float | None = None) -> None:
    """Click a control, or move a slider, and wait for the pictures."""
    window.run(
        """
        const control = document.querySelector(arguments[0]);
        if (arguments[1] === null) return control.click();
        control.value = arguments[1];
        control.dispatchEvent(new Event('input'));
        """,
        selector,
        value,
    )
    window.run("document.body.dataset.state = 'asked'")
    window.wait(IDLE)


@pytest.mark.slow
def test_the_page_shows_pytorchs_pictures(window):
    choose(window, "#faces label:nth-of-type(4) input")
    assert_shows(window, pictures_of(3, 0.7))
    choose(window, "#psi", 1)
    assert_shows(window, pictures_of(3, 1.0))
    choose(window, "#partners label:nth-of-type(8) input")
    choose(window, "#groups input[value=middle]")
    first, end = build.layer_groups(10)["middle"]
    assert_shows(window, pictures_of(3, 1.0, (7, range(first, end))))
    assert window.errors() == []
    loaded = window.run("return performance.getEntriesByType('resource').map(e => e.name)")
    origin = window.run("return location.origin")
    assert loaded
    assert all(name.startswith((origin, "data:")) for name in loaded)


@pytest.mark.slow
def test_controls_change_the_pictures_and_reset_brings_them_back(window):
    before = window.run(PIXELS, "compressed")
    for control in ("#directions input", "#psi"):
        choose(window, control, 0.1)
        assert window.run(PIXELS, "compressed") != before
    choose(window, "#reset")
    assert window.run(PIXELS, "compressed") == before
    choose(window, "#another")
    assert window.run(PIXELS, "compressed") != before
    assert window.errors() == []


@pytest.mark.slow
def test_a_walk_goes_on_until_it_is_stopped_and_counts(window):
    window.run("document.getElementById('walk').click()")
    before = window.run(PIXELS, "teacher")
    window.run("document.querySelectorAll('.rate strong').forEach(e => { e.textContent = '' })")
    window.wait("document.querySelector('#teacher strong').textContent > 0")
    window.wait("document.querySelector('#compressed strong').textContent > 0")
    choose(window, "#walk")
    after = window.run(PIXELS, "teacher")
    assert after != before
    assert window.run(PIXELS, "teacher") == after
    assert window.errors() == []


@pytest.mark.slow
def test_everything_works_by_keyboard(window):
    controls = window.run(
        "return [...document.querySelectorAll('button, input, select')].filter(e => e.tabIndex < 0"
        " || getComputedStyle(e).display === 'none' || getComputedStyle(e).visibility === 'hidden')"
        ".length"
    )
    assert controls == 0
    nameless = window.run(
        "return [...document.querySelectorAll('input, select, button')].filter(e =>"
        " !e.labels?.[0]?.textContent.trim() && !e.ariaLabel && !e.textContent.trim())"
        ".map(e => e.outerHTML)"
    )
    assert nameless == []


@pytest.mark.slow
def test_webgpu_is_offered_only_where_it_agrees(page, tmp_path):
    # A processor stands in for the GPU; where the browser has none such, the page says so.
    flags = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
    with served(page) as address, browser(tmp_path / "profile", *flags) as window:
        window.open(address)
        window.wait(IDLE, 300)
        note = window.run("return document.getElementById('backend-note').textContent")
        offered = window.run("return document.querySelectorAll('#backend option').length") == 2
        assert note.startswith("WebGPU agrees" if offered else "WebGPU is not used")
        if offered:
            window.run(
                "const list = document.getElementById('backend');"
                "list.value = 'webgpu'; list.dispatchEvent(new Event('change'))"
            )
            choose(window, "#faces label:nth-of-type(2) input")
            assert_shows(window, pictures_of(1, 0.7))
        assert window.errors() == []


@pytest.mark.slow
def test_opened_as_a_file_it_says_what_to_do(page, tmp_path):
    with browser(tmp_path / "profile", "--disable-gpu") as window:
        window.open((page / "index.html").as_uri())
        assert "python3 -m http.server" in window.run("return document.body.innerText")
        assert not window.run("return document.querySelector('main').checkVisibility()")


@pytest.mark.slow
def test_a_page_without_models_says_so(page, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(page, broken)
    (broken / "models/compressed_synthesis.onnx").write_bytes(b"none")
    with served(broken) as address, browser(tmp_path / "profile", "--disable-gpu") as window:
        window.open(address)
        window.wait("document.body.dataset.state === 'error'")
        assert "could not go on" in window.run("return document.body.innerText")
