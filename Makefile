# Every target creates the environment it needs; a second run starts at once.

PYTHON ?= python3
VENV ?= .venv
# TensorFlow's CPU-only build is much smaller, but is made for Linux and Windows alone.
TF_EXTRA ?= $(if $(filter Darwin,$(shell uname -s)),tf,tf-cpu)
BIN := $(VENV)/bin
READY := $(VENV)/.ready
comma := ,
export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: help demo bench test test-slow fuzz lint format conformance nightly hf-suite golden tiny-model test-core test-torch test-tf test-flax clean

help: ## list the targets
	@grep -hE '^(# )?[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^(# )?([a-z-]+):.*## (.*)/  make \2|\3/' | column -t -s '|'

demo: $(READY) ## continue prompts with PyTorch, TensorFlow and JAX from one checkpoint, and compare the logits
	@$(BIN)/xglm compare examples/tiny_model/checkpoint --new-tokens 24 --json $(VENV)/demo.json \
	  --text "The little" --text "После школы" --text "كل صباح" --text "हर सुबह" --text "子どもたちは" --text "Treni ya"

bench: $(READY) ## measure all cases with random weights in the 564M shape; a run that was interrupted goes on
	$(BIN)/xglm bench all --json $(VENV)/bench.json

test: $(READY) ## run the tests, but for slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) ## run the slow tests alone
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

fuzz: $(READY) ## change checkpoint files at random, 20,000 times: each must load or be rejected
	$(BIN)/python -m tests.checkpoint.fuzz 20000

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

conformance: $(READY) ## compare the three backends with the float64 oracle and with golden numbers
	$(BIN)/python -m conformance

tiny-model: $(READY) ## train the bundled checkpoint again
	$(BIN)/python examples/tiny_model/train.py

nightly: test-slow ## run the slow tests, and compare 2,000 random calls with transformers', other ones each day
	$(BIN)/python -m conformance.random_calls --count 2000 --seed $$(date +%Y%m%d)0000

# hf-suite: ## run transformers' own tests of its XGLM classes against ours, in two environments of their own
hf-suite: hf-suite-4.57.6 hf-suite-4.49.0
hf-suite-4.57.6: PARTS = tokenizers torch
hf-suite-4.49.0: PARTS = tf flax
hf-suite-%:
	$(PYTHON) -m venv .venv-hf-$*
	.venv-hf-$*/bin/pip install --quiet --disable-pip-version-check -r conformance/hf_suite/requirements-$*.txt
	.venv-hf-$*/bin/python -m conformance.hf_suite $(PARTS)

golden: ## compute the golden numbers again, in an environment with transformers
	$(PYTHON) -m venv .venv-golden
	.venv-golden/bin/pip install --quiet --disable-pip-version-check -r conformance/golden/requirements.txt
	.venv-golden/bin/python -m conformance.golden.make

# test-torch: ## test one backend in an environment of its own (test-tf, test-flax; test-core has none)
test-core test-torch test-tf test-flax: test-%:
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e '.[hub,$(if $(filter core,$*),,$(if $(filter tf,$*),$(TF_EXTRA),$*),eval,)dev$(if $(filter torch,$*),$(comma)dev-torch)]'
	XGLM_TEST_BACKENDS=$(filter-out core,$*) .venv-$*/bin/python -m pytest

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,$(TF_EXTRA),flax,hub,eval,dev,dev-torch]'
	@touch $@

clean: ## remove the environments and caches
	rm -rf .venv .venv-* .pytest_cache .mypy_cache .ruff_cache
