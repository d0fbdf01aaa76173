"""Open a report page in headless Chromium: no errors, tables sort, pictures load. `python browser_report.py PAGE`

Needs chromium and chromedriver on the PATH; speaks WebDriver over plain HTTP. Prints what it checked, or fails.
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

SORTED = """
const table = document.querySelector('#table2 ~ .scroll table');
const head = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === 'average');
const read = () => [...table.tBodies[0].rows].map(row => Number(row.cells[head].dataset.v));
const button = table.tHead.rows[0].cells[head].querySelector('button');
button.click(); const down = read(); button.click(); const up = read();
return {down, up, foot: table.tFoot.rows.length};
"""
PICTURES = "return [...document.images].map(image => [image.complete, image.naturalWidth, image.alt])"
TEXT_SORT = """
const table = document.querySelector('#provenance ~ .scroll table');
table.tHead.rows[0].cells[0].querySelector('button').click();
return [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
"""


def call(method: str, address: str, body: dict | None = None):
    """One WebDriver command; its value."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["value"]


def check(page: Path) -> dict[str, int]:
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
        assert len(order["down"]) > 1 and order["down"] == sorted(order["down"], reverse=True), order
        assert order["up"] == sorted(order["up"]) and order["foot"] == 1, order
        names = run(TEXT_SORT)
        assert names == sorted(names, key=str.casefold), names
        pictures = run(PICTURES)
        broken = [alt for complete, width, alt in pictures if not complete or not width]
        assert pictures and not broken, broken
        errors = [entry["message"] for entry in call("POST", f"{session}/se/log", {"type": "browser"})]
        assert not errors, errors
        asked = run(
            "return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).map(e => e.name)"
        )
        assert not asked, asked
        return {"rows sorted": len(order["down"]) + len(names), "pictures": len(pictures)}
    finally:
        if session:
            call("DELETE", session)
        driver.terminate()
        driver.wait(20)


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
