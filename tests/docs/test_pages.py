"""The pages: their links lead somewhere, their tables are what the recorded results say, the site builds."""

import re
import runpy
import subprocess
import sys

import pytest

from diffguard.errors import DataError
from tasks.config.project import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(text):
    """Of the headings, as GitHub and the site make them."""
    plain = (re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()) for heading in HEADING.findall(text))
    return {heading.strip().replace(" ", "-") for heading in plain}


def broken_links(path, prose):
    broken = []
    for target in LINK.findall(prose):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        leads_nowhere = not linked.exists() or (anchor and anchor not in anchors(linked.read_text(encoding="utf-8")))
        # The site has docs/ alone.
        leaves_site = ROOT / "docs" in path.parents and ROOT / "docs" not in linked.parents
        if leads_nowhere or leaves_site:
            broken.append(target)
    return broken


def test_links_lead_somewhere(page):
    assert broken_links(page.path, page.prose) == []


@pytest.mark.parametrize("target", ["nowhere.md", "method.md#nowhere", "../README.md"])
def test_a_broken_link_is_found(target):
    assert broken_links(ROOT / "docs" / "index.md", f"[text]({target})") == [target]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.fixture(scope="module")
def tables():
    return runpy.run_path(str(ROOT / "experiments" / "tables.py"))


def test_tables_are_what_the_results_say(tables):
    old = [
        path.name
        for path in tables["pages"]()
        if (text := path.read_text(encoding="utf-8")) != tables["with_tables"](text, path.name)
    ]
    assert old == [], "run python experiments/tables.py"


def test_every_table_is_shown(tables):
    shown = "".join(path.read_text(encoding="utf-8") for path in tables["pages"]())
    assert [name for name in tables["TABLES"] if f"<!-- table: {name} -->" not in shown] == []


def test_a_changed_figure_is_found(tables):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = re.sub(r"(\| `cfg-w1` \| )\d", r"\g<1>0", text)
    assert changed != text
    assert tables["with_tables"](changed, "README.md") == text


@pytest.mark.parametrize("text", ["<!-- table: nothing -->\n<!-- end of table -->", "<!-- table: digits -->\n"])
def test_a_wrong_mark_is_an_error(tables, text):
    with pytest.raises(DataError, match=r"page\.md: "):
        tables["with_tables"](text, "page.md")


def test_the_site_builds_and_fetches_nothing(tmp_path):
    """Strictly, so that a warning fails; a link to another site is no fetch, a script, style or image would be."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {"index.html", "architecture.html", "detectors.html"} <= set(pages)
    fetched = re.compile(
        r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//|<link\b[^>]*\bhref=\"(?:https?:)?//"
    )
    assert [name for name, text in pages.items() if fetched.search(text)] == []
    styles = [path.name for path in tmp_path.rglob("*.css") if re.search(r"url\([\"']?(https?:)?//", path.read_text())]
    assert styles == []
