"""What the tests of kernels share: every table that there is, and fresh inputs from a printed seed."""

from __future__ import annotations

import os
import platform

import numpy as np
import pytest

from d2moe.kernels import native

TABLES = ("scalar", "neon") if platform.machine() == "aarch64" else ("scalar", "avx2", "avx512")


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> str:
    """The name of a kernel table; run again with D2MOE_SEED=... what the seed printed with a failure says."""
    if request.param not in native.tables():
        pytest.skip(f"kernel table {request.param} is NOT TESTED: not built, or this CPU lacks it")
    return str(request.param)


@pytest.fixture
def rng() -> np.random.Generator:
    seed = int(os.environ.get("D2MOE_SEED", np.random.SeedSequence().generate_state(1)[0]))
    print(f"D2MOE_SEED={seed}")
    return np.random.default_rng(seed)
