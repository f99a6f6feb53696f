# Everything a fresh machine needs: each target sets up its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export FASTGT_DATA ?= $(abspath ../shared/data)
RESUMED = --resume --json bench/results/cpu.json
SHAPES = gt_zinc gt_sbm gps_cluster gps_wide gps_zinc scene_graphs one_head
TARGETS = sm_80 sm_90 sm_100 gfx942
ORDERED = cora mesh amazon_computers tolokers debian moby power_law

# what the installation compiles; without a compiler it says so, and only CI fails
KERNELS = setup.py $(wildcard fastgt/cpu/*.cpp fastgt/cpu/*.h)
NOT_BUILT = fastgt/cpu/not_built.txt
BUILT = if [ -f $(NOT_BUILT) ]; then echo "the CPU kernels were not built, the slow reference runs:"; \
  cat $(NOT_BUILT); [ "$$CI" != true ]; fi

CHECKED = tests/test_package.py tests/test_release.py tests/test_versions.py::test_values_and_gradients \
  tests/test_versions.py::test_every_public_operator_is_here tests/test_versions.py::test_graphs_travel

.PHONY: setup test-setup demo check test sanitize matrix matrix-lowest matrix-highest pyg-tests bench results docs \
  sdist wheels gpu budget lint clean

setup: $(VENV)/demo.stamp

test-setup: $(VENV)/test.stamp

demo: $(VENV)/demo.stamp
	$(BIN)/fastgt demo

# for every commit: what is read, and every operator once, forward and backward
check: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastgt
	$(BIN)/python tools/prose.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n logical --maxprocesses 8 $(CHECKED)

# a process for each core, which has whole files (tests/conftest.py): threads of its own would stand
# in the others' way
test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastgt
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest tools --benchmark-disable

# the site, in build/site; a link that leads nowhere ends it
docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What is released, in dist/: the sources, and the wheels of this kind of machine. Those of Linux are
# built in Docker.
sdist: $(VENV)/release.stamp
	$(BIN)/python -m build --sdist
	$(BIN)/twine check --strict dist/*.tar.gz

wheels: $(VENV)/release.stamp
	$(BIN)/cibuildwheel --output-dir dist
	$(BIN)/twine check --strict dist/*.whl
	$(BIN)/check-wheel-contents dist/*.whl

# memory, undefined behaviour and races of the compiled kernels
sanitize: $(VENV)/test.stamp
	$(BIN)/python tests/sanitize/run.py address threads

# The lowest and the highest versions declared; each environment takes several gigabytes of cache.
matrix: matrix-lowest matrix-highest

matrix-lowest matrix-highest: matrix-%: | $(BIN)/python
	$(BIN)/python tests/matrix/run.py $*

bench: $(VENV)/test.stamp
	$(BIN)/fastgt bench $(RESUMED)
	$(BIN)/fastgt bench attention --problems cora pattern --peers pyg "pyg, compiled" \
	  --shapes $(SHAPES) $(RESUMED)
	$(BIN)/fastgt bench attention --scaling nodes --peers pyg "pyg, compiled" --most 3000000 $(RESUMED)
	$(BIN)/fastgt bench attention --scaling edges --peers pyg "pyg, compiled" --most 5000000 $(RESUMED)
	OMP_NUM_THREADS=1 $(BIN)/fastgt bench attention --problems power_law zinc cora molecules pattern \
	  amazon_computers --peers pyg "pyg, compiled" torch-scatter \
	  --resume --json bench/results/cpu-1-thread.json
	$(BIN)/python -m fastgt.bench.launch --json bench/results/launch.json
	$(BIN)/python -m fastgt.bench.reordering $(ORDERED:%=--problem %) \
	  --json bench/results/reordering-cpu.json
	$(BIN)/python -m fastgt.bench.traffic --json bench/results/traffic.json
	$(BIN)/python -m fastgt.bench.distributed --json bench/results/distributed.json
	$(BIN)/python tools/seeds.py
	$(BIN)/python tools/render.py

# Models trained as published, a night on two cores; stopped, it goes on.
results: $(VENV)/demo.stamp
	$(BIN)/python tools/trainings.py
	$(BIN)/python tools/render.py

# torch-geometric's own tests on fastgt.pyg; SRC: a checkout of torch-geometric's sources
pyg-tests: $(VENV)/test.stamp
	$(BIN)/python tests/pyg/run.py "$(SRC)" --beside

# All that a GPU is for, within 10 minutes, on a machine that fetches nothing: no environment is
# made. OUT: folder of results; CARRIED: folder that `python -m fastgt.bench.gpu --pack` made.
gpu:
	@$(PYTHON) bench/gpu.py $(if $(OUT),--out "$(OUT)") $(if $(CARRIED),--carried "$(CARRIED)")

budget: $(VENV)/test.stamp
	$(BIN)/fastgt report kernels --target $(TARGETS) --json tests/kernel_budget.json

lint: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools wheel

$(VENV)/demo.stamp: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo]'
	@$(BUILT)
	touch $@

$(VENV)/docs.stamp: pyproject.toml constraints.txt | $(VENV)/demo.stamp
	$(BIN)/python -m pip install --upgrade 'pip>=25.1'  # the first that knows groups
	$(BIN)/python -m pip install -c constraints.txt --group docs
	touch $@

$(VENV)/release.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --upgrade 'pip>=25.1'  # the first that knows groups
	$(BIN)/python -m pip install -c constraints.txt --group release
	touch $@

# torch-scatter compiles against the torch installed before it; without a compiler its tests say so
$(VENV)/test.stamp: pyproject.toml constraints.txt $(KERNELS) | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	@$(BUILT)
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation torch-scatter \
	  || { [ "$$CI" != true ] && echo "torch-scatter could not be built: its tests will be skipped"; }
	touch $@ $(VENV)/demo.stamp
