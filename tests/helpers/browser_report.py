"""Open a report page in headless Chromium: no errors, tables sort, images load, it fits a phone, dark mode is legible.

`python tests/helpers/browser_report.py PAGE`. Needs chromium and chromedriver on the PATH; speaks WebDriver over plain
HTTP. Prints what it checked, or fails.
"""

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ARGUMENTS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1000"]
PHONE = 390  # CSS pixels
CONTRAST = 4.5  # WCAG AA for text

SORTED = """
const table = document.querySelector('#table2 ~ .scroll table');
const head = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === 'average');
const value = row => Number(row.cells[head].dataset.v);
const read = () => [...table.tBodies].map(body => [...body.rows].slice(1).map(value));
const cell = table.tHead.rows[0].cells[head], button = cell.querySelector('button');
const said = () => cell.getAttribute('aria-sort');
const before = read(); button.click();
const down = read(); button.click();
const up = read(), sort = said(); button.click();
return {before, down, up, after: read(), said: sort, end: said()};
"""
SMALL = """
const speaks = it => [...it.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
const small = it => it.getClientRects().length && parseFloat(getComputedStyle(it).fontSize) < 12;
return [...document.querySelectorAll('body *')].filter(it => speaks(it) && small(it))
  .map(it => it.tagName + ' ' + it.textContent.slice(0, 40));
"""
SKIP = """
const link = document.querySelector('a');
link.focus();
return [link.getAttribute('href'), link.getBoundingClientRect().left >= 0];
"""
IMAGES = "return [...document.images].map(image => [image.complete, image.naturalWidth, image.alt])"
TEXT_SORT = """
const table = document.querySelector('#provenance ~ .scroll table');
table.tHead.rows[0].cells[0].querySelector('button').click();
return [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
"""
ASKED = "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name)"
UNNAMED = """
const bare = [...document.querySelectorAll('th')].filter(head => !head.scope && head.textContent.trim());
const silent = [...document.querySelectorAll('a, button, summary')].filter(it => !it.textContent.trim());
return bare.length + silent.length;
"""
WIDTH = "return [document.documentElement.scrollWidth, window.innerWidth]"
PAIRS = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = it => {
  for (; it; it = it.parentElement) {
    const c = rgb(getComputedStyle(it).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
};
const names = ['body', '.badge', '.finding', '.cards small', 'dt', 'nav a', 'td', 'td.run', '.verdicts small',
  '.yes > b', '.no > b', '.open > b', 'tr.block th', 'ol.note li', 'summary', 'figcaption', '.right', '.wrong',
  '.example small', 'pre'];
const found = names.flatMap(name => { const it = document.querySelector(name); if (!it) return [];
    const [a, b] = [light(rgb(getComputedStyle(it).color)), light(behind(it))].sort((x, y) => y - x);
    return [[name, (a + 0.05) / (b + 0.05)]]; });
return {dark: light(behind(document.body)) < 0.1, found};
"""


def call(method: str, address: str, body: dict | None = None):
    """One WebDriver command; its value."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


def check(page: Path) -> dict[str, float]:
    """Open `page`; AssertionError where something is wrong with it, else what was counted."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    session = None
    try:
        base = f"http://127.0.0.1:{port}"
        _wait(base)
        options = {"args": ARGUMENTS, "binary": shutil.which("chromium")}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = f"{base}/session/" + call("POST", f"{base}/session", {"capabilities": wanted})["sessionId"]
        call("POST", f"{session}/url", {"url": page.resolve().as_uri()})

        def run(script: str):
            return call("POST", f"{session}/execute/sync", {"script": script, "args": []})

        order = run(SORTED)
        assert max(map(len, order["down"])) > 1, order
        assert order["down"] == [sorted(block, reverse=True) for block in order["before"]], order  # blocks stay whole
        assert order["up"] == [sorted(block) for block in order["before"]] and order["said"] == "ascending", order
        assert order["after"] == order["before"] and order["end"] is None, order
        small = run(SMALL)
        assert not small, small
        assert run(SKIP) == ["#main", True], "no link that skips to the tables"
        names = run(TEXT_SORT)
        assert names == sorted(names, key=str.casefold), names
        images = run(IMAGES)
        broken = [alt for complete, width, alt in images if not complete or not width or not alt]
        assert images and not broken, broken
        assert run(UNNAMED) == 0, "headers without scope, or links and buttons without text"
        contrasts = []
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            _devtools(session, "Emulation.setEmulatedMedia", media)
            seen = run(PAIRS)
            assert seen["dark"] == (scheme == "dark"), seen
            faint = [pair for pair in seen["found"] if pair[1] < CONTRAST]
            assert not faint, (scheme, faint)
            contrasts += [contrast for _, contrast in seen["found"]]
        phone = {"width": PHONE, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        _devtools(session, "Emulation.setDeviceMetricsOverride", phone)
        wide, window = run(WIDTH)
        assert wide <= window == PHONE, f"{wide} pixels wide on a phone of {window}"
        errors = [entry["message"] for entry in call("POST", f"{session}/se/log", {"type": "browser"})]
        assert not errors, errors
        asked = run(ASKED)
        assert not asked, asked
        return {
            "rows sorted": sum(map(len, order["down"])) + len(names),
            "images": len(images),
            "contrast": min(contrasts),
        }
    finally:
        if session:
            call("DELETE", session)
        driver.terminate()
        driver.wait(20)


def _devtools(session: str, command: str, values: dict) -> None:
    call("POST", f"{session}/goog/cdp/execute", {"cmd": command, "params": values})


def _wait(base: str) -> None:
    for _ in range(100):
        try:
            if call("GET", f"{base}/status")["ready"]:
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
    raise TimeoutError("chromedriver did not start within ten seconds")


if __name__ == "__main__":
    print(f"{sys.argv[1]}: opens without errors;", check(Path(sys.argv[1])))
