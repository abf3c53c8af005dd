# Two targets do everything on a fresh machine: demo and test. The virtual environments are this project's own.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo test check quick test-arm model clean

demo: $(VENV)/.installed
	@$(BIN)/d2moe run builtin "Once upon a time, there was a little" --memory 128MB --expert-memory 4MB --bits 4 --max-tokens 120 --seed 7

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.tested
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/lint-imports
	$(BIN)/mypy

quick: $(VENV)/.tested
	$(BIN)/python -m pytest -m "not slow" tests/pure tests/native

# The core and its kernels for AArch64, cross-compiled and run in an emulator: g++-aarch64-linux-gnu and qemu-user.
test-arm:
	tests/native/arm.sh

# Rebuilds the built-in model from the checkpoint it was made from.
model: $(VENV)/.tested
	rm -rf src/d2moe/builtin/qwen3moe-14m.d2moe
	mkdir -p build && zstd -dqf ../shared/data/train/tinystories_2MB.txt.zst -o build/tinystories.txt
	$(BIN)/d2moe convert ../shared/models/qwen3moe-14m src/d2moe/builtin/qwen3moe-14m.d2moe --calibration-tokens 262144 --calibration build/tinystories.txt \
	  --calibration ../shared/data/calibration/exl3_c4.utf8 --calibration ../shared/data/calibration/exl3_wiki.utf8
	$(BIN)/d2moe route train src/d2moe/builtin/qwen3moe-14m.d2moe --reference ../shared/models/qwen3moe-14m \
	  --text ../shared/data/calibration/exl3_c4.utf8 --text ../shared/data/calibration/exl3_wiki.utf8

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "Python 3.10 or newer is needed, this is " + sys.version'
	$(PYTHON) -m venv $(VENV)

# A source install builds the extension; it is repeated when the sources change.
$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check "scikit-build-core>=0.10" "nanobind>=2.4" "setuptools>=68"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build
