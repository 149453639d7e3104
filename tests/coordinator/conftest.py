"""What recipes are tried on."""

from __future__ import annotations

from pathlib import Path

import pytest
from recipe_texts import make, recipe_of, write_sources

from potluck.protocol.manifest import Manifest


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources' folder."""
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def built(here: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """What the recipe makes of them."""
    out = tmp_path_factory.mktemp("built") / "corpus"
    return out, make(recipe_of(), out, here)
