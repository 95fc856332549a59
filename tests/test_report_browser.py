"""The report in a real browser. Needs Chromium: `apt-get install chromium`, or CHROMIUM=/path."""

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from tests.helpers_report import finished_comparison, write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
PHONE, DESK = (390, 3600), (1280, 3200)
OWN = "not an origin"
"""The initiator of requests that the browser makes for itself."""
LOOK = """<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {
  const page = frame.contentDocument, width = frame.clientWidth;
  const wide = [...page.querySelectorAll("main *")].filter(element =>
    !element.closest(".scroll, svg") && element.getBoundingClientRect().right > width + 1);
  document.title = JSON.stringify({
    page: page.documentElement.scrollWidth, window: frame.contentWindow.innerWidth,
    wide: wide.map(element => element.outerHTML.slice(0, 80))});
});
</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None,
        reason="no Chromium: install it (Debian: apt-get install chromium) or name it in CHROMIUM",
    ),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report with everything in it: labels, curves, breakdowns, galleries."""
    folder = tmp_path_factory.mktemp("report")
    journal = folder / "journal.jsonl"
    lines = [{"step": s, "loss": 0.69 - s / 100, "accuracy": 0.5} for s in range(9)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, summary, scores = finished_comparison(folder)
    voters = ["hps", "clip", "pickscore", "aesthetic", "human"]
    facts = {
        "folder": "runs/x/labels/majority", "pairs": 3000, "decided": 2400, "voters": voters,
        "outcomes": {"majority": 2400, "tie": 580, "status": 20},
        "agreement": [[0.7 if i != j else 1.0 for i in range(5)] for j in range(5)],
    }  # fmt: skip
    write_page((folder, summary | {"labels": facts}, scores), journal)
    return folder / "report.html"


def browse(page: Path, folder: Path, size: tuple[int, int], *more: str) -> tuple[str, str]:
    """Open a page in the headless browser; returns its output and its console messages."""
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
            f"--window-size={size[0]},{size[1]}", "--enable-logging=stderr", *more, page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


def requests_of(path: Path) -> list[str]:
    """The URLs that a page requested, from the browser's own log of network events."""
    text = path.read_text().rstrip()
    log = json.loads(text if text.endswith("}") else text.rstrip(",") + "]}")
    names = {number: name for name, number in log["constants"]["logEventTypes"].items()}
    started = [
        event["params"]
        for event in log["events"]
        if names[event["type"]] == "URL_REQUEST_START_JOB" and "url" in event.get("params", {})
    ]
    return [request["url"] for request in started if request.get("initiator") != OWN]


def framed(page: Path, folder: Path, size: tuple[int, int], *, opened: bool = False) -> Path:
    """The page in a frame of a given size; no window is narrower than 500 pixels."""
    text = page.read_text().replace("<details>", "<details open>" if opened else "<details>")
    style = f"width: {size[0]}px; height: {size[1]}px; border: 0"
    frame = folder / "frame.html"
    inside = f'<iframe style="{style}" srcdoc="{escape(text, quote=True)}"></iframe>'
    frame.write_text(f'<body style="margin: 0">{inside}{LOOK}')
    return frame


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_the_page_loads_without_error_or_request(page, tmp_path, size):
    log, image = tmp_path / "net.json", tmp_path / "page.png"
    shown = framed(page, tmp_path, size) if size == PHONE else page
    _, said = browse(shown, tmp_path, size, f"--log-net-log={log}", f"--screenshot={image}")
    assert said == ""
    assert requests_of(log) == []
    assert image.stat().st_size > 20_000  # a blank page has a few kilobytes
    if kept := os.environ.get("SCREENSHOTS"):
        shutil.copy(image, Path(kept) / f"report-{size[0]}.png")


def test_an_error_or_a_request_would_be_seen(tmp_path):
    bad, log = tmp_path / "bad.html", tmp_path / "net.json"
    bad.write_text('<img src="http://example.invalid/a.png"><script>missing()</script>')
    _, said = browse(bad, tmp_path, DESK, f"--log-net-log={log}", "--dump-dom")
    assert "missing is not defined" in said
    assert requests_of(log) == ["http://example.invalid/a.png"]


@pytest.mark.parametrize("size", [PHONE, DESK])
def test_nothing_is_wider_than_the_window(page, tmp_path, size):
    """Tables scroll inside their panels; the page itself never scrolls sideways."""
    dom, _ = browse(framed(page, tmp_path, size, opened=True), tmp_path, size, "--dump-dom")
    widths = json.loads(unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL).group(1)))
    assert widths["window"] == size[0]
    assert widths["wide"] == []
    assert widths["page"] <= size[0]
