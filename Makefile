# make demo    everything from a bare machine to a comparison of SPK4 with Q4_0 on SmolLM2-135M
# make test    the tests, with the patched and the unpatched runtime
# make bench   the benchmarks
# make fuzz    damaged files and random bytes for FUZZ_SECONDS (600), then faults at every call; needs clang.
#              FUZZ_INPUTS=10000000 FUZZ_FILES=1000000: so many instead
# make soak    llama-cpp-python's server under load for SOAK_SECONDS (1200)
# make clean   forget the environment (the build cache stays; see `spikequant doctor` for its place)
#
# PYTHON=python3.12 chooses the interpreter. The environment is .venv, runtimes are built once and cached.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/.stamps

# An unpacked tree kept beside the build makes rebuilding after a change of the patch a matter of seconds.
export SPIKEQUANT_KEEP_TREE ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test bench fuzz soak setup runtime unpatched clean
.DEFAULT_GOAL := test

demo: runtime
	@$(BIN)/spikequant demo

test: runtime unpatched
	@$(BIN)/pytest

bench: runtime
	@$(BIN)/python benchmarks/matmul.py
	@$(BIN)/python benchmarks/end_to_end.py

fuzz: runtime
	@PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py
	@SPIKEQUANT_LONG_TESTS=1 $(BIN)/pytest tests/test_faults.py

soak: runtime
	@PYTHONPATH=tests $(BIN)/python tests/soak.py

setup: $(STAMPS)/packages

$(STAMPS)/environment:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo "error: $(PYTHON) is missing or older than Python 3.10; name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v "$${CC:-cc}" >/dev/null 2>&1 && command -v "$${CXX:-c++}" >/dev/null 2>&1 || \
		{ echo "error: no C and C++ compiler; on Debian or Ubuntu: sudo apt install build-essential" >&2; exit 1; }
	@echo "Creating $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# The exact versions of constraints.txt exist for Python 3.11 and newer.
$(STAMPS)/packages: $(STAMPS)/environment pyproject.toml constraints.txt
	@echo "Installing packages (torch is large; the first time takes minutes)"
	@if $(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then pins="-c constraints.txt"; fi; \
		$(BIN)/python -m pip install --quiet $$pins --upgrade pip && \
		PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet $$pins -e '.[convert,report,test]'
	@touch $@

# Both look into the build cache first, so they take seconds unless the patch or the compiler flags changed.
runtime: $(STAMPS)/packages
	@$(BIN)/spikequant build

unpatched: $(STAMPS)/packages
	@$(BIN)/spikequant build --unpatched

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .ruff_cache
