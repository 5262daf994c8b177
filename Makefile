PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
ASV := $(BIN)/asv --config benchmarks/asv.conf.json
# The reference is of the adapters' public names, and of the core but for its kernels and learners.
CORE := $(filter-out %/__init__.py,$(wildcard hybridcore/*.py hybridcore/dynamics/*.py))
PAGES := hybridcore hybridcore_torch hybridcore_keras hybridcore.dynamics hybridcore.dynamics.rssm \
	$(addprefix hybridcore_torch.,lightning huggingface accelerate) $(subst /,.,$(CORE:.py=))

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[torch,lightning,huggingface,cli,bench,dev]'
	@touch $@

demo: $(STAMP) ## train one model with and without hybridcore and draw hybridcore-demo.png
	$(BIN)/hybridcore demo --output hybridcore-demo.png

test: $(STAMP) ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations 20

lint: $(STAMP) ## check style, formatting, types and the architecture
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP) ## make the reference from the docstrings, in build/docs; a warning is an error
	PDOC_ALLOW_EXEC=1 KERAS_BACKEND=torch $(BIN)/python -W error::UserWarning -m pdoc \
		--docformat numpy --no-show-source --output-directory build/docs $(PAGES)

bench: $(STAMP) ## run every benchmark once, to see that it works; the times are not kept
	$(ASV) machine --yes >/dev/null
	$(ASV) check --environment existing
	OMP_NUM_THREADS=1 $(ASV) run --environment existing --quick --dry-run --show-stderr

clean: ## remove everything that the other targets made
	rm -rf $(VENV) .asv build dist hybridcore-demo.png
	rm -rf .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find hybridcore adapters tests benchmarks examples -name __pycache__ -type d \
		-exec rm -rf {} + 2>/dev/null || true
