"""DVC's page of plots with all scripts in it, so that a browser needs no network: `python -m tasks.plots`."""

import re

from tasks.common.console import run_stage
from tasks.common.files import write_whole
from tasks.config import project
from tasks.services.dvc import run_dvc

PAGE = "dvc_plots/index.html"
"""Where DVC writes it."""

VEGA_LITE = "5.21"
"""DVC's specifications are of version 5."""

_FETCHED = re.compile(r'<script[^>]*\ssrc="https?://[^"]*"[^>]*>\s*</script>')


def main() -> None:
    run_dvc("plots", "show")
    page = project.ROOT / PAGE
    html = with_scripts(page.read_text(encoding="utf-8"))
    write_whole(page, lambda target: target.write_text(html, encoding="utf-8"))
    print(f"file://{page}")


def with_scripts(html: str) -> str:
    """The page with Vega, Vega-Lite and Vega-Embed in place of the scripts that a browser would fetch."""
    from vl_convert import javascript_bundle

    scripts = javascript_bundle(vl_version=VEGA_LITE).replace("</script", "<\\/script")
    parts = iter([f"<script>{scripts}</script>"])
    return _FETCHED.sub(lambda _: next(parts, ""), html)


if __name__ == "__main__":
    run_stage(main)
