# `make` alone lists the targets: each line that has a `## ` comment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The four folders in their installed layout, for tools that cannot follow an editable install.
TREE := build/tree

# A process for each core, with one thread each: tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadscope

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo demo-latents test test-all test-rest lint types bench bench-faults bench-forecast bench-gpu bench-imagenet bench-recipes bench-schemes bench-regularisers figures docs release tree clean distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-19s %s\n", $$1, $$2 }'

demo: $(VENV)/.recipes ## train a small model on photos, with the stage monitors on
	$(BIN)/stagewise train experiment=photos

demo-latents: $(VENV)/.recipes ## make latents, train SiT-S/2 on them with every callback, sample
	rm -rf build/latents build/latents-run
	$(BIN)/stagewise make-latents build/latents --rows 2000 --classes 10
	$(BIN)/stagewise train experiment=imagenet256_sdvae_sit_s data.latents.path=build/latents \
	  data.num_classes=10 data.held_out=100 data.batch_size=4 data.num_workers=0 \
	  trainer.max_steps=30 trainer.log_every_n_steps=5 trainer.accelerator=cpu callbacks=steer \
	  callbacks.monitor.every_n_steps=15 callbacks.errors.queries=2 \
	  callbacks.memorization.samples=4 callbacks.memorization.steps=4 \
	  evaluation.queries=128 evaluation.samples_per_class=2 evaluation.steps=4 \
	  run_dir=build/latents-run
	$(BIN)/stagewise sample build/latents-run --count 64 --steps 4 --method euler

test: $(VENV)/.dev ## run the tests; it names those that are slow or need what is not installed
	$(PYTEST)

test-all: $(VENV)/.all ## install torch-cluster (compiled: some minutes), run all tests
	$(PYTEST) --slow

test-rest: $(VENV)/.all ## the same, but only what `make test` has just skipped
	$(PYTEST) --rest --dist load --maxschedchunk 1

lint: $(VENV)/.dev ## check style, format, imports and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/python .ci/imports.py
	@$(MAKE) --no-print-directory types

bench: $(VENV)/.peers ## time the engines against their floors and their peers (installs those)
	@mkdir -p build
	$(BIN)/python benchmarks/oracle.py --json build/bench.json

bench-gpu: $(VENV)/.recipes ## measure the oracle on a CUDA device (7 minutes), fill docs/engines.md
	$(BIN)/python benchmarks/gpu.py --seconds 420 --json docs/gpu.json

bench-imagenet: $(VENV)/.recipes ## the same on made latents of ImageNet's size (11 GB of disk)
	$(BIN)/python benchmarks/imagenet.py

bench-recipes: $(VENV)/.recipes ## time loader and oracle of the ImageNet recipes, count what they cost
	$(BIN)/python benchmarks/recipes.py --threads 2
	$(BIN)/python benchmarks/costs.py

bench-schemes: $(VENV)/.recipes ## train with and without schemes (hours; resumes), fill docs/results.md
	$(BIN)/python benchmarks/schemes.py --threads 1
	$(BIN)/python benchmarks/schemes.py --threads 1 --only default --horizons 600,750 --data photos8
	$(BIN)/python benchmarks/schemes.py --threads 1 --variance
	$(BIN)/python benchmarks/schemes.py --threads 1 --why --data photos8
	$(BIN)/python benchmarks/schemes.py --threads 1 --why --data photos16 --seeds 1
	$(BIN)/python benchmarks/schemes.py --report

bench-faults: $(VENV)/.dev ## kill, flip bits, fill disks (half an hour; resumes), fill docs/faults.md
	$(BIN)/python benchmarks/faults.py

bench-forecast: $(VENV)/.recipes ## hold the forecast against training (an hour; resumes), fill docs/forecast.md
	$(BIN)/python benchmarks/forecast.py

bench-regularisers: $(VENV)/.recipes ## train on few samples with and without smoothing (hours; resumes)
	$(BIN)/python benchmarks/regularisers.py --threads 1
	$(BIN)/python benchmarks/regularisers.py --report
	$(BIN)/python benchmarks/schemes.py --report

figures: $(VENV)/.recipes ## train three small models, draw what docs/watching.md shows (half an hour)
	$(BIN)/python benchmarks/watching.py

docs: $(VENV)/.docs ## write the site to build/docs (runs its notebooks), check its links
	@rm -rf build/docs docs/reference/generated # menus and removed names would stay as they were
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -E -W --keep-going -d build/doctrees docs build/docs
	$(BIN)/python .ci/links.py build/docs

release: $(VENV)/.dev ## build sdist and wheel, check them, install the wheel into an empty environment
	rm -rf dist build/release
	$(BIN)/pip install --quiet build twine
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv build/release
	build/release/bin/pip install --quiet "$$(ls dist/*.whl)[recipes]"
	cd build && release/bin/stagewise --version && release/bin/stagewise train --help > /dev/null

clean: ## remove what was built (make clean keeps .venv, make distclean removes it)
	rm -rf build dist docs/reference/generated *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## remove what was built and .venv
	rm -rf $(VENV)

# mypy reads the tree, a reader has the folders: translate the paths it prints.
types: $(VENV)/.dev tree
	@echo "$(BIN)/mypy"
	@MYPYPATH=$(TREE) $(BIN)/mypy $(TREE)/stagewise benchmarks .ci examples > build/mypy.txt; \
	code=$$?; \
	sed -E -e 's#^$(TREE)/##' -e 's#^stagewise/(losses|callbacks|recipes)/#\1/#' build/mypy.txt; \
	exit $$code

# Times are kept (-p): that is how mypy knows what it need not read again.
tree:
	@rm -rf $(TREE)
	@mkdir -p $(TREE)
	@cp -Rp stagewise $(TREE)/
	@cp -Rp losses callbacks recipes $(TREE)/stagewise/

# One file for each set of extras says that it is installed. They depend on pyproject.toml, so that
# a second call installs nothing and a changed dependency is fetched.
#
# Bytecode is written for what is imported, when it is first imported: compiling all of torch while
# installing costs half a minute.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/pip install --quiet --no-compile --editable

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.recipes: pyproject.toml | $(BIN)/pip
	@echo "installing '.[recipes]' into $(VENV): PyTorch is several GB, so the first time takes minutes"
	@$(INSTALL) '.[recipes]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/pip
	@echo "installing '.[dev]' into $(VENV): PyTorch is several GB, so the first time takes minutes"
	@$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.recipes

# torch-cluster has no wheel: it is compiled against the torch that is installed, which an isolated
# build would not see. pip keeps the wheel, so that this is paid once; but by its name alone, and one
# that was made for another torch does not load. Its extensions are compiled side by side.
$(VENV)/.all: pyproject.toml $(VENV)/.dev
	@echo "installing '.[cluster]' into $(VENV): torch-cluster is compiled, some minutes"
	@printf '[build_ext]\nparallel = %s\n' $$(nproc) > $(VENV)/parallel.cfg
	@export DIST_EXTRA_CONFIG=$(CURDIR)/$(VENV)/parallel.cfg CFLAGS=-g0 CXXFLAGS=-g0; \
	$(BIN)/pip install --quiet --no-compile --no-build-isolation --editable '.[dev,cluster]' && \
	{ $(BIN)/python -c 'import torch_cluster' 2> /dev/null || $(BIN)/pip install --quiet --no-compile \
	  --no-build-isolation --no-cache-dir --no-deps --force-reinstall torch-cluster; }
	@touch $@

# What the benchmark compares with and nothing else needs; pykeops compiles when it is first asked.
$(VENV)/.peers: $(VENV)/.all
	-@$(BIN)/pip install --quiet pykeops faiss-cpu
	@touch $@

$(VENV)/.docs: pyproject.toml | $(BIN)/pip
	@echo "installing '.[recipes,docs]' into $(VENV): PyTorch is several GB, so the first time takes minutes"
	@$(INSTALL) '.[recipes,docs]'
	@touch $@ $(VENV)/.recipes
