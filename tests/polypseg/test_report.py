"""The web page about a run and the contact sheet."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from polypseg.data import find_pairs, read_image, read_mask
from polypseg.data.splits import published_validation_stems
from polypseg.drawing import PREDICTION, TRUTH
from polypseg.evaluate import evaluate_run
from polypseg.examples import Example, contact_sheet, residual_traces, worst_examples
from polypseg.lineage import Lineage, Origin, write_lineage
from polypseg.predictor import Predictor
from polypseg.report import write_report
from polypseg.scores import SummaryRow, read_rows, table_cells
from polypseg.testsets import find_test_sets


@pytest.fixture
def pairs(synthetic_data):
    return find_pairs(synthetic_data / "TestDataset" / "Synthetic")


def example(name: str = "one", height: int = 60, width: int = 100) -> Example:
    image = np.full((height, width, 3), 100, np.uint8)
    truth, prediction = np.zeros((2, height, width), bool)
    truth[10:40, 10:40] = True
    prediction[20:50, 20:90] = True
    return Example(name, image, truth, prediction, 0.25)


def pictures(page: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/\w+;base64,([^"]+)"', page)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_worst_examples_come_worst_first_with_their_dice(tiny_run, pairs):
    predictor = Predictor.from_run(tiny_run, "explicit")
    expected = {}
    for pair in pairs:
        truth = read_mask(pair.mask) == 1
        prediction = predictor.predict(read_image(pair.image)).mask
        overlap = (truth & prediction).sum()
        expected[pair.stem] = 2 * overlap / (truth.sum() + prediction.sum())
    found = worst_examples(predictor, pairs)
    assert [e.name for e in found] == sorted(expected, key=lambda stem: expected[stem])
    assert [e.dice for e in found] == pytest.approx(sorted(expected.values()))
    assert len(worst_examples(predictor, pairs * 3)) == 12


def test_traces_leave_out_the_explicit_pass(tiny_run, pairs):
    predictors = {name: Predictor.from_run(tiny_run, name) for name in ("explicit", "anderson")}
    traces = residual_traces(predictors, pairs[:2])
    assert list(traces) == ["anderson"]
    assert [len(residuals) for residuals in traces["anderson"]] == [20, 20]
    assert traces["anderson"][0][-1] < 0.01 * traces["anderson"][0][0]


def test_the_page_shows_what_the_run_holds_and_needs_nothing_else(copy_run, synthetic_data):
    run = copy_run()
    (run / "results.csv").write_text(
        "phase,epoch,val_dice\nexplicit,0,0.111\nexplicit,1,0.22222\n<i>implicit,0,0.333\n"
    )
    Image.new("RGB", (33, 22)).save(run / "curves.png")
    (run / "versions.json").write_text('{"torch": "<script>9"}')
    evaluate_run(
        run,
        find_test_sets([synthetic_data]),
        ["explicit", "anderson"],
        limit=2,
        command="my & command",
    )
    examples = {"hyper": [example("<b>x</b>"), example("two")]}
    path = write_report(run, examples, {"anderson": [np.ones(3)]})
    assert path == run / "report.html"
    page = path.read_text()

    assert "Research use only, not a medical device." in page
    for row in read_rows(run / "evaluation" / "summary.csv", SummaryRow):
        for cell in table_cells(row):
            assert f"<td>{cell}</td>" in page
    assert "my &amp; command" in page
    assert "0.2222<" in page
    assert "<td>&lt;i&gt;implicit</td><td>0</td><td>0.333</td>" in page
    assert "0.111" not in page  # not the last epoch of its phase
    assert "size: 64" in page
    assert "&lt;script&gt;9" in page
    assert "<script" not in page
    assert "&lt;b&gt;x&lt;/b&gt;: Dice 25.0 %" in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    sizes = [picture.size for picture in pictures(page)]
    assert len(sizes) == 5  # accuracy against time, two examples, residuals, curves
    assert sizes[-1] == (33, 22)


def test_pictures_show_truth_and_prediction(copy_run):
    page = write_report(copy_run(), {"hyper": [example(height=300, width=420)]}).read_text()
    (picture,) = pictures(page)
    pixels = np.asarray(picture).astype(int)

    def near(position, colour):
        return abs(pixels[position] - colour).max() < 60

    assert near((25, 10), TRUTH)
    assert near((35, 89), PREDICTION)
    assert near((30, 60), (100, 100, 100))


def test_a_run_that_has_only_begun_has_a_page(copy_run):
    run = copy_run()
    assert "holds weights and no log of their training" in write_report(run).read_text()
    for weights in run.glob("*.safetensors"):
        weights.unlink()
    page = write_report(run).read_text()
    assert "Not evaluated yet" in page
    assert "No epoch has been finished yet" in page
    assert "size: 64" in page
    assert not pictures(page)


def test_the_page_says_what_the_run_was_trained_on(copy_run):
    run = copy_run()
    assert "The run has no data.json" in write_report(run).read_text()
    seen = {f"s{number}": ["", ""] for number in range(4)}
    encoder = Lineage(Origin("mit <b0>.safetensors", "ab12"), seen, {"v": ["", ""]})
    start = Origin("implicit.safetensors", "cd34", "parent", encoder)
    write_lineage(run, Lineage(start, {"a": ["", ""], "b": ["", ""]}, {"b": ["", ""]}))
    assert (
        "<h2>Data</h2>\n<p>2 training and 1 validation images, 1 of which trained too; parted at "
        "random, by the seed 0.</p><p>Started from implicit.safetensors (SHA-256 cd34) of the run "
        "parent, which trained on 4 images and started from the pretrained encoder "
        "mit &lt;b0&gt;.safetensors (SHA-256 ab12), the rest from random weights.</p>"
    ) in write_report(run).read_text()
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("group: ''", "group: ^(\\w)"))
    assert "parted at random by group ^(\\w), by the seed 0.</p>" in write_report(run).read_text()
    config.write_text(config.read_text().replace("group: ^(\\w)", "group: ''"))
    published = {stem: ["", ""] for stem in published_validation_stems()}
    write_lineage(run, Lineage(None, seen, published))
    assert (
        "<p>4 training and 145 validation images; parted by the committed list polyp_val.txt.</p>"
        "<p>Started from random weights.</p>"
    ) in write_report(run).read_text()


def test_a_contact_sheet_has_image_truth_and_prediction_in_a_row():
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet([example(), example()], side=200))))
    assert sheet.shape[1] == 4 * 6 + 3 * 200
    for top in (20, 20 + 120 + 26):  # images of 60 x 100 pixels, scaled by 2
        panels = [sheet[top : top + 120, left : left + 200] for left in (6, 212, 418)]
        assert (panels[0] == 100).all()
        for panel, colour, (rows, columns) in (
            (panels[1], TRUTH, ((20, 80), (20, 80))),
            (panels[2], PREDICTION, ((40, 100), (40, 180))),
        ):
            changed = (panel != 100).any(axis=2)
            inside = np.zeros((120, 200), bool)
            inside[slice(*rows), slice(*columns)] = True
            np.testing.assert_array_equal(changed, inside)
            assert (panel[rows[0], columns[0] : columns[1]] == colour).all()
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
