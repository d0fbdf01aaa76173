"""The site works without a network: no page makes a browser ask another host for scripts, styles, fonts or images.

`mkdocs build` checks every built page by the same function (`on_post_page` of docs/hooks.py); links in text are fine.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://unpkg.com/mermaid"></script>',
        "<link rel=stylesheet href=//fonts.example.org/css>",
        '<img alt="a picture" src="http://example.org/a.svg">',
        '<style>@import "https://example.org/a.css";</style>',
        "<style>@font-face { src: url(https://example.org/a.woff2) }</style>",
        '<pre class="mermaid"><code>flowchart LR</code></pre>',
    ],
)
def test_what_loads_from_another_host_ends_the_build(hooks, tag):
    assert len(hooks.loads_from_elsewhere(tag)) == 1
    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    with pytest.raises(Exception, match=r"page\.md: the page loads"):
        hooks.on_post_page(f"<html>{tag}</html>", page, None)


def test_links_and_local_files_are_fine(hooks):
    link, local = '<a class="x" href="https://example.org">text</a>', '<script src="assets/a.js"></script>'
    page = f"{link} {local} <img src=../pictures/a.svg>"
    assert hooks.on_post_page(page, None, None) == page


def test_the_settings_load_nothing():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)
    settings = yaml.load((DOCS.parent / "mkdocs.yml").read_text(), Loader)
    assert settings["theme"]["font"] is False and settings["hooks"] == ["docs/hooks.py"]
    assert not {"extra_javascript", "extra_css", "repo_url", "extra"} & set(settings)


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_the_sources_of_the_pages_load_nothing(hooks, page):
    text = re.sub(r"`[^`\n]*`", "", page.read_text())
    assert "```mermaid" not in text and not re.search(r"!\[[^\]]*\]\((?:https?:)?//", text)
    assert hooks.loads_from_elsewhere(text) == []


def test_pictures_name_no_other_host():
    for picture in (DOCS / "pictures").iterdir():
        named = set(re.findall(r"https?://[^\"' >]+", picture.read_text()))
        assert named <= {"http://www.w3.org/2000/svg"}, "an XML namespace is a name, which no browser loads"
