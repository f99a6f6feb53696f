# Everything a fresh machine needs: each target sets up its own environment first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
GRAPHS = zinc cora citeseer actor squirrel minesweeper power10k power70k amazon_computers tolokers \
  dd flights debian
ORDERED = cora mesh amazon_computers tolokers debian moby power_law

.PHONY: setup test-setup demo test bench budget lint clean

setup: $(VENV)/demo.stamp

test-setup: $(VENV)/test.stamp

demo: $(VENV)/demo.stamp
	$(BIN)/fastgt demo

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fastgt
	$(BIN)/pytest

bench: $(VENV)/test.stamp
	$(BIN)/python -m fastgt.bench.attention --problem power_law --problem debian --problem molecules \
	  --json bench/results/attention-cpu.json
	$(BIN)/python -m fastgt.bench.attention $(GRAPHS:%=--problem %) --repeats 5 \
	  --json bench/results/graphs-cpu.json
	$(BIN)/python -m fastgt.bench.transformer_conv --problem power_law --problem molecules \
	  --repeats 31 --json bench/results/transformer_conv-cpu.json
	$(BIN)/python -m fastgt.bench.linear_attention --json bench/results/linear_attention-cpu.json
	$(BIN)/python -m fastgt.bench.masked_heads --json bench/results/masked_heads-cpu.json
	$(BIN)/python -m fastgt.bench.reordering $(ORDERED:%=--problem %) \
	  --json bench/results/reordering-cpu.json
	$(BIN)/python -m fastgt.bench.traffic --json bench/results/traffic.json
	$(BIN)/python -m fastgt.bench.render

budget: $(VENV)/test.stamp
	$(BIN)/python -m fastgt.kernels.ahead > tests/kernel_budget.json

lint: $(VENV)/test.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip setuptools wheel

$(VENV)/demo.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[demo]'
	touch $@

# torch-scatter compiles against the torch installed before it; without a compiler its tests say so
$(VENV)/test.stamp: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation torch-scatter \
	  || { [ "$$CI" != true ] && echo "torch-scatter could not be built: its tests will be skipped"; }
	touch $@ $(VENV)/demo.stamp
