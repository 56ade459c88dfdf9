"""DVC's page of plots, as DVC draws it, needs no network."""

import re

from dvc_render.html import render_html
from dvc_render.vega import VegaRenderer

from tasks.plots import with_scripts

FETCHED = re.compile(r'<(?:script|link)[^>]*(?:src|href)="(?!#)[^"]*"')


def test_what_a_browser_would_fetch_is_in_the_page(tmp_path):
    points = [{"fpr": x / 10, "tpr": (x / 10) ** 0.5, "rev": "workspace"} for x in range(11)]
    drawn = VegaRenderer(points, "roc", x="fpr", y="tpr", template="linear", revs_with_datapoints=["workspace"])
    page = render_html([drawn], tmp_path / "index.html").read_text()
    assert len(FETCHED.findall(page)) >= 3  # Vega, Vega-Lite, Vega-Embed
    whole = with_scripts(page)
    assert not FETCHED.search(whole)
    assert "vegaEmbed" in whole
    assert len(whole) > len(page) + 500_000  # the libraries, of a megabyte
    assert whole.lower().count("</script>") == whole.lower().count("<script")
    assert '"tpr"' in whole
