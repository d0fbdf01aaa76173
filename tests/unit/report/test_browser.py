"""The page in a real browser: see browser_report.py. Skipped where Chromium or its driver is not installed."""

import shutil

import browser_report
import pytest

from grace.report import commands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (shutil.which("chromium") and shutil.which("chromedriver")),
        reason="chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)",
    ),
]


@pytest.fixture(scope="module")
def page(results_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "fake"
    shutil.copytree(results_folder, folder)
    commands.figures(folder, folder / "figures")
    commands.speed(folder, folder / "speed")
    commands.page(folder, folder / "report" / "index.html")
    return folder / "report" / "index.html"


def test_the_page_works_in_a_browser(page):
    counted = browser_report.check(page)
    assert counted["rows sorted"] > 30 and counted["images"] > 8


@pytest.mark.parametrize(
    "old, new",
    [
        ('"use strict";', '"use strict"; nowhere();'),
        ("data:image/svg+xml;base64,", "data:image/svg+xml;base64,broken"),
        ('<p class="finding">', '<p class="finding" style="width: 60rem">'),
        ("--ink: #e9e7e3", "--ink: #555"),
    ],
    ids=["script fails", "image is broken", "too wide for a phone", "dark on dark"],
)
def test_what_is_wrong_with_a_page_is_found(page, tmp_path, old, new):
    text = page.read_text()
    assert old in text
    (tmp_path / "index.html").write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        browser_report.check(tmp_path / "index.html")
