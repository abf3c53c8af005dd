"""The benchmarks that need neither torch nor another engine can be loaded: what they take from each other and from the package is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
ELSEWHERE = ("peer_", "quality")
"""Prefixes of those that run in another engine's environment, or that tests/torch loads."""
NAMES = [p.stem for p in sorted(FOLDER.glob("*.py")) if not p.stem.startswith(ELSEWHERE)]


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no benchmarks beside these tests")
def test_benchmarks_can_be_loaded() -> None:
    assert len(NAMES) > 8
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = subprocess.run([sys.executable, "-c", code, *NAMES], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
