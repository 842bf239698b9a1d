# make help lists what there is. PYTHON=python3 takes the Python that is here, with its own torch (Colab, Kaggle), and builds no .venv.
VENV   := .venv
PYTHON ?= $(VENV)/bin/python
RECIPE ?=
ARGS   ?=
GPUS   ?=
DATA   ?=
FILE   ?=
RUN    ?=
CARD   ?= T4
# tests in a process for each core, up to four
SHARED := -n auto --maxprocesses 4 --dist worksteal
SETUP  := $(if $(filter $(VENV)/bin/python,$(PYTHON)),$(VENV)/.ready)
# make itself takes any name: `make train data=mine` would train for hours on other pictures
NAMES  := PYTHON RECIPE ARGS GPUS DATA FILE RUN CARD
TYPED  := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
WRONG  := $(filter-out $(NAMES) VENV SHARED SHELL MAKE MAKEFLAGS,$(TYPED))
$(if $(WRONG),$(error found $(WRONG)=; \
expected names of $(NAMES). What to do: correct the name (capital letters); options of a run go into ARGS="--seed 1"))

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(SETUP)  ## build .venv with the versions that are tested (train and test do it by themselves)

$(VENV)/.ready: requirements.txt .ci/constraints.txt
	python3 .ci/machine.py
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt -c .ci/constraints.txt
	touch $@

# as it was typed, $ and quotes too, where make's own words would lose them
train look: export PICTURES = $(value DATA)
inspect: export ADAPTER = $(value FILE)
report: export FOLDER = $(value RUN)
train: $(SETUP)  ## fine-tune: t4 with a GPU, pocket without (--better, but with DATA); RECIPE=original DATA=my_pictures ARGS="--seed 1"; on all GPUs, or GPUS=1
	@gpus=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); \
	seen=$$(echo "$${CUDA_VISIBLE_DEVICES-$$(seq -s , $$gpus)}" | tr , '\n' | grep -c '^[^-]'); \
	if [ $$seen -lt $$gpus ]; then gpus=$$seen; fi; \
	if [ -n "$(RECIPE)" ]; then recipe="$(RECIPE)"; why="as asked"; \
	elif [ -n "$(findstring --config,$(ARGS))" ]; then recipe=; why="--config"; \
	elif [ $$gpus -gt 0 ]; then recipe="t4 --device cuda"; why="a GPU is here"; \
	else recipe=pocket; why="no GPU found"; \
	  [ -n "$$PICTURES$(filter --quick --plain --no-better --dataset-name%,$(ARGS))" ] || recipe="pocket --better"; fi; \
	start="$(PYTHON)"; gpus=$(or $(GPUS),$$gpus); \
	if [ $$gpus -gt 1 ]; then why="$$why; on $$gpus GPUs, GPUS=1 takes one"; \
	  export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(( ($$(nproc) + gpus - 1) / gpus ))}; \
	  start="$(PYTHON) -m torch.distributed.run --standalone --nproc-per-node $$gpus"; fi; \
	echo "recipe $${recipe:-of the file} ($$why)"; \
	if [ -n "$$PICTURES" ]; then name=$$(basename -- "$$PICTURES"); kind=$${recipe:-config}; \
	  set -- --dataset-name "$$PICTURES" --output-dir "runs/$${kind%% *}-$$name$(subst $() ,,$(patsubst --%,-%,$(filter --quick --better --plain,$(RECIPE) $(ARGS))))"; fi; \
	exec $$start loop.py $$recipe "$$@" $(ARGS)

plan: $(SETUP)  ## what a recipe needs on a card, without GPU or download; RECIPE=native CARD="RTX 3060"
	@$(PYTHON) loop.py $(or $(RECIPE),t4) --plan-for "$(or $(CARD),T4)" $(ARGS)

look: $(SETUP)  ## the set before training, no model needed: the crops that make train would make, and what is odd; DATA=my_pictures RECIPE=native
	@$(PYTHON) -m see.look $(or $(RECIPE),$(shell nvidia-smi -L >/dev/null 2>&1 && echo t4 || echo pocket)) $${PICTURES:+--dataset-name "$$PICTURES"} $(ARGS)

xformers: $(SETUP)  ## add xFormers for RECIPE=original, without its dependencies: it must not change torch
	-$(PYTHON) -m pip install --quiet --no-deps xformers

generate: $(SETUP)  ## before/after picture of the newest run, also with options alone, ARGS="--seeds 1 2"; an adapter or prompts are drawn as given, ARGS="runs/t4 --prompts 'a fox'"
	@$(PYTHON) generate.py $(ARGS) $(if $(filter-out -%,$(firstword $(ARGS)))$(filter --prompts% --plain --checkpoints --strengths% --help -h,$(ARGS)),,--compare)

inspect: $(SETUP)  ## what an adapter file holds, where it acts, its traps in other programs; FILE=a.safetensors, else the newest run's (docs/adapters.md)
	@$(PYTHON) -m adapters inspect $${ADAPTER:+"$$ADAPTER"} $(ARGS)

report: $(SETUP)  ## the newest run's page anew, all of it in one file for any browser: OUT/report.html; RUN=runs/t4
	@$(PYTHON) -m see.page $${FOLDER:+"$$FOLDER"}

board: $(SETUP)  ## losses, learning rates and previews of all runs in TensorBoard, at the address that it prints
	@$(PYTHON) -m tensorboard.main --logdir runs $(ARGS)

bench: $(SETUP)  ## seconds and GiB per technique on this GPU, random weights; ARGS=card: this card in five minutes, one file to share
	$(PYTHON) -m benchmarks.ladder $(if $(ARGS),$(ARGS),ladder)

test: $(SETUP)  ## the mathematics, the laws and the whole job on a small model; CPU, no network
	$(PYTHON) -m pytest $(SHARED)

check: $(SETUP)  ## lint and format
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

notebooks: $(SETUP)  ## run both notebooks and check what they store; ARGS=--write stores it anew
	$(PYTHON) notebooks/execute.py $(ARGS)

stress: $(SETUP)  ## kill runs, fill disks, damage files: the laws must hold (CPU, 19 minutes); ARGS="--only kills"
	PYTHONPATH=tests $(PYTHON) -m stress $(if $(ARGS),$(ARGS),--seed 0 --runs 200 --inputs 1000 --out benchmarks/results/stress.json)

slow: $(SETUP)  ## the tests that make test leaves out; those of the run's page need a Chromium, on the PATH or as $CHROME
	$(PYTHON) -m pytest -m "slow or browser" -rs $(SHARED)

check-all: notebooks slow  ## what is slow; CI runs check, test and this

clean:  ## remove .venv and tool caches; runs/ and the encoded pictures in cache/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: help setup train plan look xformers generate inspect report board bench test check notebooks stress slow check-all clean
.DEFAULT_GOAL := help
