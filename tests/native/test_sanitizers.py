"""Slots, reader, executor and pool under ThreadSanitizer and AddressSanitizer: streaming_test.cpp, built with each and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
WITH = {"thread": "thread", "address": "address,undefined"}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH)
def test_streaming_under_a_sanitizer(name, tmp_path):
    # ThreadSanitizer of older compilers cannot stand randomised addresses of newer kernels.
    run = ["setarch", "-R"] if shutil.which("setarch") and not subprocess.run(["setarch", "-R", "true"], check=False).returncode else []
    trial = tmp_path / "trial.cpp"
    trial.write_text("int main() {}")
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, f"-fsanitize={WITH[name]}", trial, "-o", tmp_path / "trial"]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode or subprocess.run([*run, tmp_path / "trial"], capture_output=True, check=False).returncode:
        pytest.skip(f"the streaming core under {name} sanitizer is NOT TESTED: {compiler} lacks it. {made.stderr[-200:]}")
    build = ROOT / "build" / f"tests-{name}"
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-DD2MOE_TESTS_ONLY=ON", "-DD2MOE_SCALAR_ONLY=ON", f"-DD2MOE_SANITIZE={WITH[name]}"],
        ["cmake", "--build", build, "--target", "streaming_test"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    seed = int(np.random.default_rng().integers(1 << 31))
    options = {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_stack_use_after_return=1", "UBSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [*run, build / "streaming_test", tmp_path, str(seed)], capture_output=True, text=True, check=False, env=os.environ | options
    )
    assert done.returncode == 0 and "are well" in done.stdout, done.stdout + done.stderr
