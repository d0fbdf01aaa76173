"""The page's structure, read as a browser would read it; browser_report.py opens it in a real one."""

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from grace.errors import GraceError
from grace.report import commands
from grace.report.figures.style import nothing, save, style
from grace.report.figures.write import NAMES
from grace.report.speed import FIGURES as TIMED

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting, and collects ids, links, images, addresses and the texts of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.ids, self.links, self.sources, self.rows = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a":
            self.links.append(given["href"])
        if tag == "img":
            assert given["alt"]
        if "src" in given:
            self.sources.append(given["src"])
        if tag == "link":
            self.sources.append(given["href"])
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.rows and self.open and self.open[-1] in ("td", "th", "b", "u", "small"):
            self.rows[-1].append(data)


@pytest.fixture(scope="module")
def built(results_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "fake"
    shutil.copytree(results_folder, folder)
    with style() as plt:
        for name in (*NAMES, *TIMED):
            place = folder / ("speed" if name in TIMED else "figures")
            place.mkdir(exist_ok=True)
            save(nothing(plt, name), place, name)
    out = folder / "report" / "index.html"
    commands.page(folder, out)
    return folder, out.read_text()


def test_page_is_well_formed_and_self_contained(built):
    page = Page(built[1])
    assert len(page.ids) == len(set(page.ids))
    inside = {link.removeprefix("#") for link in page.links if not link.startswith("data:")}
    assert len(inside) > 8 and inside <= set(page.ids)
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert "http://" not in built[1] and "https://" not in built[1]


def test_figures_and_example_images_are_inlined_whole(built):
    folder, text = built
    sources = Page(text).sources
    for path in (*folder.glob("figures/*.svg"), *folder.glob("speed/*.svg")):
        figure = base64.b64encode(path.read_bytes()).decode()
        assert f"data:image/svg+xml;base64,{figure}" in sources
    images = [base64.b64decode(s.partition(",")[2]) for s in sources if s.startswith("data:image/png")]
    assert len(images) >= 3 and all(image.startswith(b"\x89PNG") for image in images)


def test_answers_and_provenance_are_there(built):
    folder, text = built
    rows = Page(text).rows
    assert text.count("✓") > 3 and text.count("✗") > 3
    for recipe, precision in (("grace", "int4"), ("rtn", "int2")):
        assert f"students/{recipe}/{precision}/seed1/predictions" in text
    assert any("GRACE" in row and "lm-eval 0.4.13" in row for row in rows)
    assert json.dumps(json.loads((folder / "config/experiment.json").read_text())["experiment"]) in text.replace(
        "&#34;", '"'
    )


def test_the_opening_says_what_was_run_and_what_was_found(built):
    text = built[1]
    head = text[text.index("<header>") : text.index("</header>")]
    assert "demo models, not LLaVA-1.5" in head and "not decided" in head
    assert head.index("GRACE is above QAT at INT4: <b>") < head.index("The teacher is above the bf16 student: <b>")
    assert "Significantly worse" in head and "it takes 5 seeds, there are 2" in head
    assert "37 models on 240 questions in 3 benchmarks" in head and "lm-eval 0.4.13" in head
    assert "Partial results" not in text


def test_tables_can_be_taken_from_the_page(built):
    text = built[1]
    found = re.search(r'download="table1.csv" href="data:text/csv;base64,([^"]+)"', text)
    assert base64.b64decode(found[1]).decode().startswith("group,Model,Bits,colour (GQA)")


def test_provenance_names_each_file_by_the_hash_that_dvc_keeps_it_under(built):
    folder, text = built
    content = (folder / "students/grace/int4/seed1/predictions/colour.parquet").read_bytes()
    assert f"{hashlib.md5(content).hexdigest()}  colour.parquet" in text


def test_partial_results_make_a_page_that_says_so(built, tmp_path):
    folder = tmp_path / "fake"
    shutil.copytree(built[0], folder)
    for below in ("teacher/predictions", "students/baseline/bf16", "students/grace/int4/seed0"):
        shutil.rmtree(folder / below)
    (folder / "students/qat/int4/seed0/predictions/pairs.parquet").unlink()
    commands.page(folder, tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    Page(text)
    assert "Partial results: 5 sets of predictions are not here (teacher, baseline bf16 seed 0" in text


def test_the_same_results_make_the_same_page(built, tmp_path):
    commands.page(built[0], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == built[1]


def test_a_missing_figure_is_named(built, tmp_path):
    folder = tmp_path / "fake"
    shutil.copytree(built[0], folder)
    (folder / "figures" / "entropy.svg").unlink()
    with pytest.raises(GraceError, match=r"entropy\.svg: no such file; draw the figures first"):
        commands.page(folder, tmp_path / "index.html")
