# make demo: environment, build, run. make test: environment, build, whole test suite, in WORKERS
# processes (make test WORKERS=0: in one).
# Override the interpreter or torch: make demo PYTHON=python3.12 TORCH="torch==2.13.0"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
# Stamps carry what was asked for, so that another TORCH, PYTHON or FEWSTEP_CUDA installs again.
TORCH_STAMP := $(VENV)/.torch-$(shell echo '$(TORCH) $(PYTHON)' | cksum | cut -d' ' -f1)
CUDA_STAMP := $(VENV)/.cuda-$(or $(FEWSTEP_CUDA),auto)
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc cmake -type f)

.PHONY: demo test lint format docs bench figures peers cache-peers doctor clean

demo: $(VENV)/.demo
	$(VENV)/bin/fewstep demo --output demo

# Threads that wait for others don't spin: the workers have the cores to share.
test: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.dev
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.dev
	$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

docs: $(VENV)/.dev
	$(PY) docs/build.py

bench: $(VENV)/.test
	$(VENV)/bin/fewstep bench ops

# The records that the documents' tables are drawn from: on an idle machine, at a clean commit.
figures: $(VENV)/.test
	$(VENV)/bin/fewstep demo --device cpu --output demo --record benchmarks/results
	$(PY) benchmarks/pipelines/digits_patches.py --record benchmarks/results
	$(PY) benchmarks/pipelines/quantized_quality.py --model digits --record benchmarks/results
	$(PY) benchmarks/pipelines/quantized_quality.py --model photos --record benchmarks/results
	$(PY) benchmarks/pipelines/dit_step.py --record benchmarks/results
	$(PY) benchmarks/pipelines/time_steps.py --record benchmarks/results
	$(PY) benchmarks/pipelines/time_steps.py --feature text --record benchmarks/results
	$(PY) benchmarks/pipelines/cache_time.py --record benchmarks/results
	$(VENV)/bin/fewstep bench ops --device cpu --output benchmarks/results

# Other packages beside the low-bit products: peers.jsonl, a record apart from the others, in an
# environment apart, because whatever is installed takes part in the other benches. It sees what
# $(VENV) has, the one build of this checkout too: a second would overwrite python/fewstep/_C*.so.
peers: $(VENV)-peers/.beside
	$(VENV)-peers/bin/python -m fewstep bench ops --device cpu --peers --output benchmarks/results

# Caches of other packages beside this library's, by the quality they leave. Nothing is timed.
cache-peers: $(VENV)-peers/.beside
	for model in digits photos photos-unet; do OMP_NUM_THREADS=1 CACHE_DIT_LOG_LEVEL=error \
		$(VENV)-peers/bin/python benchmarks/pipelines/cache_quality.py --model $$model \
		--processes $(WORKERS) --record benchmarks/results || exit 1; done

$(VENV)-peers/.beside: pyproject.toml $(TORCH_STAMP) | $(VENV)/.test
	$(PY) -m venv --clear $(VENV)-peers
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(echo $(VENV)-peers/lib/python3*/site-packages)/beside.pth
	@echo "installing the requirements of 'peers' into $(VENV)-peers"
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check \
		$$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["peers"])')
	touch $@

doctor: $(VENV)/.demo
	$(VENV)/bin/fewstep doctor

clean:
	rm -rf build dist demo $(VENV) $(VENV)-peers python/*.egg-info python/fewstep/_C*.so

$(TORCH_STAMP):
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "fewstep needs Python >= 3.11, got " + sys.version'
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing $(TORCH) into $(VENV)"
	$(PIP) "$(TORCH)" numpy
	touch $@

$(CUDA_STAMP): $(TORCH_STAMP)
	rm -f $(VENV)/.cuda-*
	touch $@

$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(CUDA_STAMP) $(SOURCES)
	@echo "building fewstep and installing the requirements of '$*'"
	$(PIP) --editable ".[$*]"
	touch $@
