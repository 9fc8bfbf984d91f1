"""The report in a real browser: pictures load, the console stays silent."""

import json
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from polypseg.evaluate import evaluate_run, report_evaluation
from polypseg.testsets import find_test_sets
from tests.polypseg.browser import BROWSER

# Writes what loaded into the page, where --dump-dom shows it.
PROBE = """<script>addEventListener("load", () => {
  const images = [...document.images].map(i => [i.complete, i.naturalWidth, i.clientWidth]);
  const wide = document.documentElement.scrollWidth - innerWidth;
  document.title = JSON.stringify({images, wide});
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here (Debian: apt install chromium)")
def test_pictures_load_and_the_console_is_silent(copy_run, synthetic_data, tmp_path):
    run = copy_run()
    (run / "results.csv").write_text("phase,epoch,val_dice\nexplicit,0,0.1\n")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(run / "curves.png")
    evaluation = evaluate_run(
        run, find_test_sets([synthetic_data]), ["explicit", "hyper"], limit=2, command="x"
    )
    page = report_evaluation(run, evaluation).read_text()
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", f"{PROBE}</body>"))
    done = subprocess.run(
        [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900",
            "--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom",
            probed.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1])
    assert len(seen["images"]) == page.count("<img") == 5
    for complete, natural, shown in seen["images"]:
        assert complete
        assert natural > 0
        assert shown > 0
    assert seen["wide"] <= 0  # nothing makes the page scroll sideways
