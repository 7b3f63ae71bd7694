"""report.html in a real browser: no error in its console, no request, and nothing wider than a phone.

Skipped where no Chromium is installed (on Debian: apt-get install chromium).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.html_requests import Page
from helpers.processes import HANG_SECONDS
from helpers.synthetic_certificate import COUNTEREXAMPLES, candidate
from helpers.synthetic_comparison import write_comparison
from helpers.synthetic_run import report_contents
from helpers.tiny import make_model_folder
from PIL import Image

from ksl_ds.certificate import report as certificate
from ksl_ds.comparison.results import finish
from ksl_ds.model.folder import ModelFolder
from ksl_ds.report.html import write_report
from ksl_ds.scan.report import scan_folders

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

PHONE = 390  # CSS pixels; headless Chromium makes no window that narrow, hence the frame
PROBE = """<!DOCTYPE html><title>probe</title><body style="margin:0">
<iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe><p id="found"></p>
<script>onload = () => {{
  const page = document.querySelector("iframe").contentDocument;
  const inside = page.documentElement.scrollWidth;
  const wide = [...page.querySelectorAll("body *")].filter((element) => !element.closest(".scroll")
    && element.getBoundingClientRect().right > {width} + 1).map((element) => element.tagName);
  document.querySelector("#found").textContent = JSON.stringify({{inside, wide}});
}}</script>"""


@pytest.fixture(scope="module", params=["lottery", "certify", "compare", "scan"])
def report(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / request.param
    if request.param == "compare":
        finish(*write_comparison(folder))
        return folder / "report.html"
    if request.param == "scan":
        before, after = (make_model_folder(folder / side, seed=seed) for seed, side in enumerate(("before", "after")))
        scan_folders(ModelFolder(before), after, folder / "scan", 0.05, "output")
        return folder / "scan" / "report.html"
    folder.mkdir()
    contents = report_contents()
    if request.param == "certify":
        rows = [candidate(alpha, certified=40, agreeing=38) for alpha in (0.05, 0.25, 0.5, 0.75, 0.95)]
        rows.insert(0, candidate(0.5, certified=50, agreeing=45, given="partial_tuning"))
        sections = certificate.certificate_sections(
            certificate.certificate_table(rows, "Agreement"),
            certificate.certificate_reading(rows),
            certificate.certificate_curves(rows),
            COUNTEREXAMPLES,
        )
        contents |= {"stages": {}, "ticket_rows": [], "figures": {}, "samples": [], "sections": sections}
    write_report(folder / "report.html", title="A run", summary="What was run.", **contents)
    return folder / "report.html"


def browse(path: Path, *words: str) -> subprocess.CompletedProcess:
    """Opens a file in headless Chromium; its console goes to stderr."""
    profile = path.parent / "profile"
    quiet = ["background-networking", "component-update", "sync", "gpu", "dev-shm-usage", "extensions"]
    return subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--hide-scrollbars",
            *(f"--disable-{name}" for name in quiet),
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={profile}",
            *words,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )


def console(process: subprocess.CompletedProcess) -> list[str]:
    return [line for line in process.stderr.splitlines() if ":CONSOLE" in line]


def test_the_console_of_this_browser_is_heard(tmp_path):
    """The control of the test below: an error and a refused request do appear."""
    policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'unsafe-inline'\">"
    (tmp_path / "bad.html").write_text(f"{policy}<img src=x.png><script>missing()</script>")
    heard = " ".join(console(browse(tmp_path / "bad.html", "--dump-dom")))
    assert "missing is not defined" in heard and "Content Security Policy" in heard


def test_the_page_opens_without_an_error_and_whole(report):
    process = browse(report, "--dump-dom")
    assert console(process) == []
    page = Page(process.stdout)
    assert page.requests == []
    # The browser's own tree has the parts that were written: no unclosed tag swallowed any.
    written = Page(report.read_text())
    for tag in ("section", "figure", "table", "tr", "td", "svg", "text", "li"):
        assert page.tags.count(tag) == written.tags.count(tag) > 0
    for tag in ("article", "dd"):
        assert page.tags.count(tag) == written.tags.count(tag)


def pixels(report: Path, *words: str) -> np.ndarray:
    shot = report.parent / "shot.png"
    shot.unlink(missing_ok=True)
    assert console(browse(report, "--window-size=1100,3000", f"--screenshot={shot}", *words)) == []
    return np.asarray(Image.open(shot).convert("L"), dtype=float)


@pytest.mark.parametrize(
    ("words", "dark"), [((), False), (("--blink-settings=preferredColorScheme=0",), True)], ids=["light", "dark"]
)
def test_light_and_dark_have_their_ground_and_readable_ink(report, words, dark):
    shot = pixels(report, *words)
    ground = np.median(shot)
    assert ground < 40 if dark else ground > 240
    # Text and axes stand out from the ground all the way down the page, figures included.
    for band in np.array_split(shot, 6):
        assert np.abs(band - ground).max() > 140


@pytest.mark.parametrize("width", [PHONE, 1000])
def test_nothing_is_wider_than_the_screen_but_boxes_that_scroll(report, width):
    probe = report.with_name("probe.html")
    probe.write_text(PROBE.format(width=width))
    dump = browse(probe, "--dump-dom", "--allow-file-access-from-files", "--virtual-time-budget=5000").stdout
    found = re.search(r'id="found">(\{.*?\})<', dump)
    assert found is not None, dump[-500:]
    assert found[1] == f'{{"inside":{width},"wide":[]}}'


def test_it_prints(report):
    pdf = report.with_suffix(".pdf")
    assert console(browse(report, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")) == []
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes()))
    assert 2 <= pages <= 15
