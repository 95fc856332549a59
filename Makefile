# BalancedDPO. `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash

EXP   ?= miniature
RUN   ?= $(EXP)
ARGS  ?=
VOTE  ?=
GATE  ?=
ROUNDS ?=
NPROC ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | wc -l); echo $$((n > 0 ? n : 1)))

VENV  ?= .venv
PY    := $(VENV)/bin/python
# Another Python (PY=python3) is taken as it is; else what is missing is installed into VENV first.
READY := $(if $(filter command,$(firstword $(origin PY))),,$(VENV)/.ready)

# One process needs no launcher; more are torchrun's, on SLURM they are srun's.
LAUNCH := $(if $(filter 1,$(NPROC)),$(PY) -m,$(VENV)/bin/torchrun --standalone --nproc-per-node=$(NPROC) -m)
# Whether the run's pairs are its own, which are generated before they are labelled. The stage itself
# decides: where ARGS names other pairs in the end, it has nothing to do.
OWN    := $(if $(findstring pairs=own,$(ARGS))$(shell grep -s 'override /pairs: own' conf/experiment/$(EXP).yaml),pairs)
# The last stage of this command: the paths of all its stages are checked before the first begins.
GOAL   := $(if $(filter eval,$(MAKECMDGOALS)),evaluate,$(if $(filter train,$(MAKECMDGOALS)),train,$(if $(OWN),$(if $(filter labels inspect,$(MAKECMDGOALS)),label))))
JOB    := experiment=$(EXP) run=$(RUN) $(if $(VOTE),vote=$(VOTE)) $(if $(GOAL),goal=$(GOAL)) $(ARGS)

# Tests side by side, one thread each: threads of several processes only wait for each other. What
# they all import is compiled once, also where a container says that no bytecode is kept.
CORES  := $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest --dist loadfile --no-loadscope-reorder

TARGETS := help setup pairs labels train eval rounds smoke inspect advise reproduce miniature test test-fast check docs examples parity bench-label bench-pairs bench-vote bench-stream bench-train gpu-day gpu-wheels lock
.PHONY: $(TARGETS)

# What nothing reads would be left out in silence, and the default run begin instead.
VARIABLES := EXP RUN VOTE ROUNDS ARGS NPROC GATE VENV PY
GIVEN     := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
STRANGE   := $(filter-out $(VARIABLES),$(GIVEN))
$(if $(STRANGE),$(error unknown variable $(STRANGE); allowed: $(VARIABLES); settings go into ARGS, as in ARGS="train.steps=400 reference=frozen"))

# A shell would end the command at these, before anyone could say so.
OPEN  := (
CLOSE := )
SPECIAL := $(strip $(foreach sign,$(OPEN) $(CLOSE) ; & | < >,$(if $(findstring $(sign),$(ARGS)),$(sign))))
$(if $(SPECIAL),$(if $(findstring ',$(ARGS))$(findstring ",$(ARGS)),,$(error ARGS has $(SPECIAL) outside quotes; put the setting into single quotes inside the double ones, as in ARGS="'pairs.root=/data/a (copy)'")))

.DEFAULT:
	$(error unknown target $@; allowed: $(TARGETS))

help: ## List the targets and their variables
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  EXP=$(EXP)  an experiment: $(basename $(notdir $(wildcard conf/experiment/*.yaml)))"
	@echo "  RUN=$(RUN)  the folder under runs/"
	@echo "  VOTE=      a vote rule: $(basename $(notdir $(wildcard conf/vote/*.yaml)))"
	@echo "  ROUNDS=    rounds of make rounds (3)"
	@echo "  GATE=      1 makes eval end with an error when any metric is shown to be worse"
	@echo "  ARGS=      further settings, e.g. ARGS=\"train.steps=400 reference=frozen\""
	@echo "  NPROC=$(NPROC)    processes on this machine"

setup: $(READY) ## Install the pinned environment into .venv (every target does it when needed)

pairs: $(READY) ## Generate the run's own pairs, where the experiment has pairs=own
	$(LAUNCH) generate $(JOB)

labels: $(READY) $(OWN) ## Score every pair with every metric and write the consensus labels
	$(LAUNCH) label $(JOB)

train: labels ## The labels if they are missing, then Diffusion-DPO on them
	$(LAUNCH) train $(JOB)

eval: train ## Labels and training if they are missing, then win rates and a report; GATE=1 fails when worse
	$(LAUNCH) evaluate $(JOB) $(if $(filter-out 0,$(GATE)),evaluate.fail_when_worse=true)

rounds: $(READY) ## Generate, label, train and judge ROUNDS times, each round with the policy of the one before
	$(PY) -m evaluate.rounds $(JOB) $(if $(ROUNDS),rounds.count=$(ROUNDS)) $(if $(filter-out 1,$(NPROC)),"rounds.launcher=$(LAUNCH)")

smoke: ## Two steps of everything into runs/smoke (or RUN), to see that it runs
	$(MAKE) eval RUN=$(if $(filter file,$(origin RUN)),smoke,$(RUN)) ARGS="debug=smoke $(ARGS)"

inspect: labels ## Statistics of the labels in the terminal, and a page with images
	$(PY) -m label $(JOB) label.inspect=true

advise: $(READY) ## Which beta would have had which gradient factor, by the first 50 steps of the run
	$(PY) -m train $(JOB) train.advise=true

reproduce: $(READY) ## The paper's comparison in miniature, resumable (about an hour); ARGS=--plan says what it does
	$(PY) -m benchmarks.reproduce $(ARGS)

miniature: $(READY) ## Rebuild the embedded weights from nothing into runs/miniature-weights (about an hour)
	$(PY) -m data.miniature --folder runs/miniature-weights $(ARGS)

test: $(READY) ## All tests that need neither GPU nor download
	$(PYTEST) -n $(CORES) -m "not gpu and not weights" $(ARGS)

test-fast: $(READY) ## The quick ones
	$(PYTEST) -n $(CORES) -m "not gpu and not weights and not ranks and not slow" $(ARGS)

check: $(READY) ## Lint, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(READY) ## Build the documentation strictly into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet --site-dir site
	@echo "documentation: site/index.html; with search: python3 -m http.server --directory site"

examples: $(READY) ## Run the three scripts of examples/ one after the other into runs/example
	$(PY) -m examples.label_pairs
	$(PY) -m examples.train_on_labels
	$(PY) -m examples.judge_models

parity: $(READY) ## Published scores against ours, and accuracy on the run's pairs, with what is at hand
	$(PY) -m label.parity $(JOB)

bench-label: $(READY) ## Speed of stage one beside bare forward passes and per-pair scoring
	OMP_WAIT_POLICY=PASSIVE $(PY) -m benchmarks.label $(ARGS)

bench-pairs: $(READY) ## Speed of generating pairs beside the bare pipeline, and memory as the prompts grow
	OMP_WAIT_POLICY=PASSIVE $(PY) -m benchmarks.pairs $(ARGS)

bench-vote: $(READY) ## Seconds of a new vote over 959 040 pairs
	$(PY) -m benchmarks.vote $(ARGS)

bench-stream: $(READY) ## How fast stage two reads images and latents, beside what is possible
	$(PY) -m benchmarks.stream $(ARGS)

bench-train: $(READY) ## Speed and memory of stage two: a table, and one JSON object on the last line
	$(PY) -m benchmarks.train $(ARGS)

gpu-day: $(READY) ## All that is worth measuring on one GPU, in 9 minutes; ARGS=--dry runs it on a CPU
	$(PY) -m benchmarks.gpu_day $(ARGS)

gpu-wheels: $(READY) ## Gather into wheels/ what a GPU machine without a network lacks
	$(PY) -m benchmarks.gpu_day.wheels $(ARGS)

lock: $(READY) ## Renew the pins in constraints.txt from pyproject.toml
	$(VENV)/bin/uv pip compile pyproject.toml --group dev --group docs --upgrade --quiet \
	  --no-annotate --no-header --no-emit-index-url -o constraints.txt

$(VENV)/.ready: pyproject.toml constraints.txt
	@python3 -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; python3 is " + sys.version.split()[0])'
	test -x $(PY) || python3 -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^uv==' constraints.txt)"
	$(VENV)/bin/uv pip install --quiet --compile-bytecode --python $(PY) -r pyproject.toml --group dev --group docs -c constraints.txt
	@touch $@
