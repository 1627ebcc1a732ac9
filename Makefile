# Each target makes its own virtual environment; nothing has to be installed but Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SAGEMAKER := $(VENV)-sagemaker
RECORDS := .pytest_cache/records
export HF_HUB_OFFLINE = 1

.PHONY: demo sweep-demo test test-quick test-slow test-sagemaker lint format clean
.NOTPARALLEL:

demo: $(VENV)/installed
	$(BIN)/python demo/run.py --output_dir demo/output

sweep-demo: $(VENV)/installed
	$(BIN)/python demo/sweep.py --output_dir demo/output/sweep

# Ends with the list of tests that did not run, why, and how to run them. FAIL_ON_SKIP=1 makes that an error.
test: test-quick test-slow test-sagemaker
	$(BIN)/python tests/skips.py $(RECORDS)/quick.json $(RECORDS)/slow.json $(RECORDS)/sagemaker.json

test-quick: $(VENV)/installed
	TEST_RECORD=$(RECORDS)/quick.json $(BIN)/python -m pytest -n 2 --durations=12 -m "not slow and not sagemaker and not gpu"

test-slow: $(VENV)/installed
	TEST_RECORD=$(RECORDS)/slow.json $(BIN)/python -m pytest --durations=12 -m "slow and not gpu"

# tests/conftest.py imports torch, which is not in this environment.
test-sagemaker: $(SAGEMAKER)/installed
	TEST_RECORD=$(RECORDS)/sagemaker.json PYTHONPATH=tests \
		$(SAGEMAKER)/bin/python -m pytest --noconftest -p skips tests/test_submit.py

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf demo/data demo/output .pytest_cache .ruff_cache

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

# The SDK asks for other versions of much that the scripts use.
$(SAGEMAKER)/installed: requirements.txt sagemaker/requirements.txt
	$(PYTHON) -m venv $(SAGEMAKER)
	$(SAGEMAKER)/bin/python -m pip install --quiet --upgrade pip
	grep -E '^(pytest|moto\[.*\])==' requirements.txt | \
		$(SAGEMAKER)/bin/python -m pip install --quiet -r sagemaker/requirements.txt -r /dev/stdin
	touch $@
