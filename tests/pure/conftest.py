"""What tests of containers share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from containers import make


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "tiny.d2moe")


@pytest.fixture
def copy(sample: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sample, tmp_path / "tiny.d2moe"))
