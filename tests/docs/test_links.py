"""The files that README.md and docs/ link to or name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.fences import PAGES, ROOT

pytestmark = pytest.mark.quick

_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_NAMED = re.compile(r"`((?:recipes|components|models|tools|tests|benchmarks)/[\w/]+(?:\.py|/))`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = [page.parent / target for target in _LINK.findall(text)]
    targets += [ROOT / name for name in _NAMED.findall(text)]
    assert [str(target) for target in targets if not target.exists()] == []
