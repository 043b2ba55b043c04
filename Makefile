# make demo                 the whole job on photographs that scikit-image ships
# make demo IMAGES=folder   the same on your own pictures (sub-folder names become labels)
# make test                 lint, types, import contracts, tests
# make test-fast            the same without the tests that take long
# make docs                 the documentation as a site, in docs/_build
# make install              what the demo needs, in .venv
# make lock                 new versions into requirements.lock, after a change of pyproject.toml or constraints.txt

PYTHON ?= python3
export IMAGES
VENV := .venv
BIN := $(VENV)/bin
# Hundreds of processes import the same files: whatever the environment says, they are compiled once.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 GOMP_SPINCOUNT=1000 $(BIN)/python -m pytest
# Files that use a marker: to collect the others, too, takes as long as some of the tests.
marked = $$(grep -rl --include='*.py' 'mark\.$(1)\>' tests)
# Many tests wait for a process or a timer: two files at a time fill two cores.
SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
LINT := { $(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; false; }; } \
  && $(BIN)/ruff check --quiet . && $(BIN)/mypy && $(BIN)/lint-imports
PIP := $(BIN)/python -m pip --disable-pip-version-check
PILLOW := 12.1.1
AVX2 := $(shell grep -q -w avx2 /proc/cpuinfo 2>/dev/null && echo -mavx2)
PILLOW_SIMD := pillow-simd==$(PILLOW).post0 --hash=sha256:8e9694ec94c59d12f16753cbf48a3080266bdd704b0c51a630318c7a325625b1
# PyTorch's build for CPUs, which is not on PyPI: pip has to be told where it is.
TORCH := 2.13.0+cpu
TORCH_HASH := sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
# On Linux on x86-64, where that build is found, everything is installed by its hash. `make LOCK= ...` goes without.
LOCK := $(if $(filter Linux-x86_64,$(shell uname -s -m | tr ' ' -)),requirements.lock)
FOR_TESTS := \# For the tests:
BY_HASH := $(PIP) install --quiet --no-deps --require-hashes --requirement
LOCKING := uv pip compile --quiet --upgrade pyproject.toml --group build --constraint constraints.txt --no-annotate --no-header \
  --python-platform x86_64-manylinux_2_28 --python-version 3.11 --generate-hashes --no-emit-index-url

.PHONY: demo test test-fast lint docs install lock clean

demo: $(VENV)/.demo
	@images=; [ -z "$$IMAGES" ] || images=$$(realpath -e -- "$$IMAGES") || exit 1; \
	  set -x; $(BIN)/submit dag demo $${images:+"stages.photographs.recipe.images='$$images'"}

# The tests on SLURM and those on Ray mostly wait for timers, and mypy has one core: beside the others they cost
# little time.
test: $(VENV)/.test
	@{ $(LINT); } >$(VENV)/lint.log 2>&1 & lint=$$!; \
	  $(PYTEST) -m slurm $(call marked,slurm) >$(VENV)/slurm-tests.log 2>&1 & slurm=$$!; \
	  $(PYTEST) -m "ray and not slurm" $(call marked,ray) >$(VENV)/ray-tests.log 2>&1 & ray=$$!; \
	  $(PYTEST) $(SIDE_BY_SIDE) -m "not slurm and not ray"; others=$$?; \
	  wait $$slurm; slurm=$$?; cat $(VENV)/slurm-tests.log; \
	  wait $$ray; ray=$$?; cat $(VENV)/ray-tests.log; \
	  wait $$lint; lint=$$?; cat $(VENV)/lint.log; exit $$((others || slurm || ray || lint))

test-fast: $(VENV)/.test lint
	@$(PYTEST) $(SIDE_BY_SIDE) -m "not slow and not slurm and not ray"

lint: $(VENV)/.test
	$(LINT)

# Sphinx reads docs/*.md; docs/reference.py makes the pages of commands and keys.
docs: $(VENV)/.demo
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[docs]'
	@$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build
	@echo "docs/_build/index.html"

install: $(VENV)/.demo

lock: $(VENV)/bin/python
	$(LOCKING) --extra demo --extra test --output-file $(VENV)/test.lock
	$(LOCKING) --extra demo --constraint $(VENV)/test.lock --output-file $(VENV)/demo.lock
	{ cat $(VENV)/demo.lock; echo '$(FOR_TESTS)'; \
	  awk 'FNR == NR { known[$$1]; next } /^[^ ]/ { new = !($$1 in known) } new' $(VENV)/demo.lock $(VENV)/test.lock; } \
	  | awk '/^[^ ]/ { other = !/^torch==/; if (!other) print "torch==$(TORCH) \\\n    --hash=$(TORCH_HASH)" } other' \
	  >requirements.lock

clean:
	rm -rf $(VENV) docs/_build docs/reference

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info)' \
	  || { echo "Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ..."; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# Arguments: an extra of pyproject.toml, and what prints the part of the lock that it needs.
define install
@if [ -n "$(LOCK)" ] && awk '/^[^ ]/ { this = /^torch==/ } this' $(LOCK) | $(BY_HASH) /dev/stdin --dry-run >/dev/null 2>&1; then \
  $(2) $(LOCK) | $(BY_HASH) /dev/stdin && $(PIP) install --quiet --no-deps --no-build-isolation --editable .; \
else \
  [ -z "$(LOCK)" ] || echo "installing without hashes, for pip finds no torch $(TORCH) of this hash; with them: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make install"; \
  $(PIP) install --quiet --constraint constraints.txt --editable '.[$(1)]'; \
fi
@$(MAKE) --no-print-directory pillow-simd
@touch $@
endef

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt requirements.lock
	$(call install,demo,sed '/^$(FOR_TESTS)/Q')

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt requirements.lock
	$(call install,test,cat)

# Pillow and pillow-simd own the same module, and pip knows nothing of it: Pillow first, then the SIMD build over it.
.PHONY: pillow-simd
pillow-simd:
	@$(BIN)/python -c 'import PIL; assert ".post" in PIL.__version__' 2>/dev/null \
	  || echo "$(PILLOW_SIMD)" \
	  | CC="$${CC:-cc} $(AVX2)" $(BY_HASH) /dev/stdin --force-reinstall >$(VENV)/pillow-simd.log 2>&1 \
	  || { awk '/^[^ ]/ { this = /^pillow==/ } this' requirements.lock | $(BY_HASH) /dev/stdin --force-reinstall; \
	       echo "pillow-simd did not build (log: $(VENV)/pillow-simd.log): going on with Pillow; for the faster build: apt-get install gcc python3-dev libjpeg-dev zlib1g-dev libwebp-dev libtiff-dev liblcms2-dev, then make clean install"; }
