"""What benchmarks change of the machine is put back, and what benchmarks/limited.py compares is the same tokens."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


def test_the_read_ahead_is_put_back_after_an_error(tmp_path):
    import machine

    knob = tmp_path / "read_ahead_kb"
    knob.write_text("8192\n")
    with pytest.raises(KeyboardInterrupt), machine.read_ahead(knob, 128):
        assert knob.read_text() == "128"
        raise KeyboardInterrupt
    assert knob.read_text() == "8192\n"
    with machine.read_ahead(knob, None):
        assert knob.read_text() == "8192\n"
    with machine.read_ahead(None, 128):
        pass


def test_ratios_are_over_the_tokens_that_both_decoded():
    import limited

    seed = int(np.random.default_rng().integers(1 << 30))
    rng = np.random.default_rng(seed)
    mine, theirs = rng.uniform(0.1, 1, 9), rng.uniform(1, 3, 5)
    found = limited.ratio({"spans": mine.tolist()}, {"spans": theirs.tolist()})
    assert found == pytest.approx(theirs.sum() / mine[:5].sum()), seed
    assert limited.ratio({"spans": mine.tolist()}, {"spans": []}) is None


def test_the_bound_is_reading_or_computing_whichever_takes_longer():
    import limited

    line = {"spans": [0.5, 0.5], "read_bytes": 60, "disk_bytes_per_s": 100.0, "stall_s": 0.3}
    assert limited.derived(dict(line))["disk_share"] == pytest.approx(0.6)
    assert limited.derived(dict(line))["bound_share"] == pytest.approx(0.7)
    assert limited.derived(line | {"stall_s": 0.6})["bound_share"] == pytest.approx(0.6)


def test_tokens_of_the_skewed_routing_come_again():
    import limited

    for seed in range(1, 4):
        uniform, skewed = (limited.tokens_of(name, 400, seed) for name in ("uniform", "skewed"))
        again = [float((t[1:] == t[:-1]).mean()) for t in (uniform, skewed)]
        assert again[0] < 0.01 and 0.3 < again[1] < 0.7, (seed, again)
        assert len(set(uniform.tolist())) > 2 * len(set(skewed.tolist()))
