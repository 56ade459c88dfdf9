import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from tasks.config.project import ROOT

PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Page:
    """A page of the documentation."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """Without blocks of code."""
        return FENCED.sub("", self.text)

    def blocks(self, language: str) -> list[str]:
        return [block for kind, block in FENCED.findall(self.text) if kind == language]


@pytest.fixture(params=[Page(path) for path in PAGES], ids=lambda page: page.name)
def page(request):
    return request.param
