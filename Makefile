# make demo                 the whole job on photographs that scikit-image ships
# make demo IMAGES=folder   the same on your own pictures (sub-folder names become labels)
# make test                 lint, types, import contracts, tests
# make test-fast            the same without the tests that take long
# make install              what the demo needs, in .venv

PYTHON ?= python3
export IMAGES
VENV := .venv
BIN := $(VENV)/bin
PYTEST := GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest
# Many tests wait for a process or a timer: two files at a time fill two cores.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
PILLOW := 12.1.1
AVX2 := $(shell grep -q -w avx2 /proc/cpuinfo 2>/dev/null && echo -mavx2)

.PHONY: demo test test-fast lint install clean

demo: $(VENV)/.demo
	@images=; [ -z "$$IMAGES" ] || images=$$(realpath -e -- "$$IMAGES") || exit 1; \
	  set -x; $(BIN)/submit dag demo $${images:+"stages.photographs.recipe.images='$$images'"}

# The tests on SLURM and those on Ray mostly wait for timers: beside the others they cost little time.
test: $(VENV)/.test lint
	@$(PYTEST) -m slurm >$(VENV)/slurm-tests.log 2>&1 & slurm=$$!; \
	  $(PYTEST) -m "ray and not slurm" >$(VENV)/ray-tests.log 2>&1 & ray=$$!; \
	  $(PYTEST) $(SIDE_BY_SIDE) -m "not slurm and not ray"; others=$$?; \
	  wait $$slurm; slurm=$$?; cat $(VENV)/slurm-tests.log; \
	  wait $$ray; ray=$$?; cat $(VENV)/ray-tests.log; exit $$((others || slurm || ray))

test-fast: $(VENV)/.test lint
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not slurm and not ray"

lint: $(VENV)/.test
	$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	$(BIN)/lint-imports

install: $(VENV)/.demo

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info)' \
	  || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	@$(MAKE) --no-print-directory pillow-simd
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@$(MAKE) --no-print-directory pillow-simd
	@touch $@

# Pillow and pillow-simd own the same module, and pip knows nothing of it: Pillow first, then the SIMD build over it.
.PHONY: pillow-simd
pillow-simd:
	@$(BIN)/python -c 'import PIL; assert ".post" in PIL.__version__' 2>/dev/null \
	  || CC="$${CC:-cc} $(AVX2)" $(PIP) install --quiet --no-deps --force-reinstall pillow-simd==$(PILLOW).post0 >$(VENV)/pillow-simd.log 2>&1 \
	  || { $(PIP) install --quiet --no-deps --force-reinstall pillow==$(PILLOW); \
	       echo "pillow-simd did not build (log: $(VENV)/pillow-simd.log): going on with Pillow; for the faster build: apt-get install gcc python3-dev libjpeg-dev zlib1g-dev libwebp-dev libtiff-dev liblcms2-dev, then make clean install"; }
