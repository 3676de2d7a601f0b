# Works on a fresh clone with Python >= 3.11 and a C++ compiler; everything is installed into .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRA  ?= cpu
STAMP  := $(VENV)/.installed-$(EXTRA)
LINTED := build/lint

.PHONY: setup demo browser test lint bench clean

setup: $(STAMP)

# torch first: its version decides what the others may be. Say PIP_INDEX_URL=... for another package index.
$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "vlprune needs Python 3.11 or newer: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[$(EXTRA),dev]"
	touch $@

demo: setup
	$(BIN)/vlprune compress blip-tiny --ratio 0.9 --export onnx --samples 200 --bench-batch 1 --output demo

# The tests of report.html run in Chromium, and are skipped without it. Continuous integration calls this first.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit 0; done; \
	export DEBIAN_FRONTEND=noninteractive; \
	test "$$(id -u)" = 0 && apt-get update --quiet=2 \
		&& apt-get install --quiet=2 --yes --no-install-recommends chromium fonts-dejavu-core > /dev/null \
		|| echo "no Chromium: the tests of report.html in a browser will be skipped; install it, or run this as root on Debian"

test: setup
	$(BIN)/python -m pytest -q

# mypy cannot see the mapped folders cli/ and exporters/ in an editable install: it checks the built wheel.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pydoclint --quiet vlprune cli exporters benchmarks
	rm -rf $(LINTED)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir $(LINTED) .
	$(BIN)/python -m pip install --quiet --no-deps --target $(LINTED)/site $(LINTED)/vlprune-*.whl
	cd $(LINTED)/site && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml -p vlprune

bench: setup
	for script in benchmarks/[a-z]*.py; do $(BIN)/python $$script --quick || exit 1; done

clean:
	rm -rf build dist demo $(VENV)
