"""The page that an image is dropped into: what it shows, and all of it in a real browser."""

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from polypseg import demo
from polypseg.data import find_pairs, read_image
from polypseg.demo import SAMPLE_SOURCE
from polypseg.drawing import overlay
from polypseg.predictor import Predictor, available_solvers
from polypseg.released import sample_images
from tests.polypseg.browser import BROWSER, Browser


@pytest.fixture(scope="module")
def predictors(tiny_run) -> dict[str, Predictor]:
    names = available_solvers(tiny_run)
    assert names == ["explicit", "broyden", "anderson", "hyper"]
    return {name: Predictor.from_run(tiny_run, name, device="cpu") for name in names}


@pytest.fixture
def photo(synthetic_data) -> Path:
    return find_pairs(synthetic_data / "TestDataset" / "Synthetic")[0].image


def test_an_image_gives_mask_contour_and_a_line_for_each_solver(predictors, photo):
    found = demo.answer(predictors, photo)
    image, result = read_image(photo), predictors["hyper"].predict(read_image(photo))
    assert 0 < result.mask.mean() < 1
    np.testing.assert_array_equal(found.contour, overlay(image, result.mask))
    np.testing.assert_array_equal(found.mask, np.where(result.mask, 255, 0)[..., None].repeat(3, 2))
    assert [row[0] for row in found.rows] == list(predictors)
    assert {len(row) for row in found.rows} == {len(demo.HEADER)}
    explicit, *_, hyper = (dict(zip(demo.HEADER, row, strict=True)) for row in found.rows)
    assert (explicit["evaluations of f"], explicit["residual"]) == ("1", "–")
    assert float(hyper["residual"]) > 0  # measured, although the solver had no need to
    assert hyper["polyp area"] == f"{100 * result.mask.mean():.1f}%"


def test_the_curves_are_those_of_the_solvers(predictors, photo, monkeypatch):
    drawn = {}

    def draw(traces):
        drawn.update(traces)
        return residual_plot(traces)

    residual_plot = demo.residual_plot
    monkeypatch.setattr(demo, "residual_plot", draw)
    curves = demo.answer(predictors, photo).curves
    assert curves.dtype == np.uint8
    assert curves.shape[2] == 3
    assert curves.std() > 0
    assert list(drawn) == ["broyden", "anderson", "hyper"]
    for (trace,) in drawn.values():
        assert len(trace) == demo.TRACED_EVALUATIONS
    # Both start from zero; that of the HyperSolver learned where to.
    assert drawn["broyden"][0][0] == drawn["anderson"][0][0] == 1


def test_one_pass_alone_has_no_curve(predictors, photo):
    assert demo.answer({"explicit": predictors["explicit"]}, photo).curves is None


def test_what_is_no_usable_image_is_told_in_a_sentence(predictors, tmp_path):
    with pytest.raises(ValueError, match="no image yet"):
        demo.answer(predictors, None)
    Image.new("RGB", (31, 200)).save(tmp_path / "tiny.png")
    with pytest.raises(ValueError, match=r"31 x 200 pixels; both sides need at least 32"):
        demo.answer(predictors, tmp_path / "tiny.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"file 'text\.png'.*intact image") as error:
        demo.answer(predictors, tmp_path / "text.png")
    assert str(tmp_path) not in str(error.value)
    Image.new("RGB", (32, 32)).save(tmp_path / "small.png")
    assert demo.answer(predictors, tmp_path / "small.png").mask.shape == (32, 32, 3)


def test_without_gradio_the_extra_is_named(tiny_run):
    code = "import sys; sys.modules['gradio'] = None; from polypseg import cli; "
    code += f"sys.exit(cli.demo(['--run', {str(tiny_run)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        'polypseg needs its extra packages: pip install "deqsolvers[demo]" (gradio is missing)\n'
    )


@pytest.fixture
def address(tiny_run, tmp_path):
    """The page served by the command itself, which has to end in peace."""
    # A shell's background jobs, and what they start, ignore the interrupt.
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"from polypseg import cli; sys.exit(cli.demo(['--run', {str(tiny_run)!r}]))"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path / "uploads")}
    errors = tmp_path / "errors.txt"
    with (
        errors.open("w") as sink,
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE, stderr=sink, text=True, env=environment,
        ) as server,
    ):  # fmt: skip
        try:
            line = server.stdout.readline()
            assert line, errors.read_text()
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0]
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)
    assert "Traceback" not in errors.read_text()
    left = [each for each in (tmp_path / "uploads").rglob("*") if each.is_file()]
    assert {each.name for each in left} <= {each.name for each in sample_images()}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")
@pytest.mark.skipif(find_spec("gradio") is None, reason='no gradio: pip install "deqsolvers[demo]"')
def test_the_page_in_a_browser(address, photo, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    with Browser(tmp_path / "profile") as browser:
        browser.call("Page.navigate", url=address)
        browser.wait_for("document.querySelector('input[type=file]')")
        press = "[...document.querySelectorAll('button')].find(b => b.innerText == 'Find polyps')"
        browser.wait_for(press)
        browser.run(f"{press}.click()")
        browser.wait_for("document.body.innerText.includes('There is no image yet')")
        browser.choose_file("input[type=file]", photo)
        of_size = (
            "[...document.images].filter(i => i.complete"
            " && i.naturalWidth == {} && i.naturalHeight == {}).length"
        )
        browser.wait_for(f"{of_size.format(80, 80)} == 3")  # the image, contour and mask
        browser.wait_for("document.body.innerText.includes('anderson')")
        text = browser.run("document.body.innerText")
        for word in ("hyper", "broyden", "anderson", "EXPLICIT", "Research use only"):
            assert word in text
        assert SAMPLE_SOURCE in text
        with Image.open(sample_images()[0]) as sample:
            of_sample = of_size.format(*sample.size)
        assert browser.run(of_sample) == 1  # where it is offered
        browser.run("document.querySelector('.gallery-item').click()")
        browser.wait_for(f"{of_sample} == 4")
        # It would send the picture to a public site.
        assert browser.run("document.querySelectorAll('[aria-label=Share]').length") == 0
        browser.run("document.querySelector('[aria-label=\"Remove Image\"]').click()")
        browser.wait_for("document.querySelector('input[type=file]')")
        browser.choose_file("input[type=file]", tmp_path / "text.png")
        browser.wait_for("document.body.innerText.includes('replace it by an intact image')")
        browser.wait_for("!document.body.innerText.includes('FIXED_STEPS')")
        hosts = {urlsplit(each).hostname for each in browser.requests if each.startswith("http")}
        assert hosts == {urlsplit(address).hostname}
        assert browser.problems == []
