# `make up`    set up, raise the pocket model (or go on where it stopped), open a chat with it
# `make test`  set up, check style and types, run the tests that fit in minutes

RECIPE ?= pocket
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The first interpreter that runs and is one fledge supports; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3.12 python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)

.PHONY: up setup test test-all mutants conformance clients schemas lint bench clean
.DEFAULT_GOAL := up

# The run that was raised is the last word of what `raise` says: after a change of plan it has another name than the recipe.
up: setup
	@said=$$($(BIN)/fledge raise $(RECIPE)) || exit $$?; echo "$$said"; run=$${said##* }; \
	if [ -t 0 ] && [ -t 1 ]; then $(BIN)/fledge chat "$$run"; \
	else echo "The model is ready. Chat with it in a terminal: $(BIN)/fledge chat $$run"; fi

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fledge needs Python 3.11 or 3.12 (with venv); install one, or say make PYTHON=/path/to/python"; exit 2; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two processes of one thread each: 4,600 tests of short operations gain little from a second thread.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: lint
	$(PYTEST)

test-all: lint
	$(PYTEST) -m 'slow or not slow'

# Bugs injected into the alignment code one at a time: a fast test must catch each; writes the table in docs/alignment.md.
mutants: setup
	$(BIN)/python tests/mutants/mutate.py

# The API tests of OpenAI's own clients against our server, then a minute of made-up requests by each OpenAPI document
# (schemathesis, always the same ones); writes docs/conformance.md.
conformance: setup
	$(BIN)/python tests/conformance/run.py
	$(BIN)/python tests/conformance/schemas.py --seconds 60

# Other ecosystems' clients (LangChain, LlamaIndex, lm-eval, Vercel's and a dozen more), fetched into environments of their
# own, against our server; writes the table in docs/clients.md.
clients: setup
	$(BIN)/python tests/conformance/clients.py

# The same requests and many more: what they find depends on the time they have.
SEED ?= 0
schemas: setup
	$(BIN)/python tests/conformance/schemas.py --seconds 300 --examples 30 --seed $(SEED)

bench: setup
	$(BIN)/python bench/train_speed.py
	$(BIN)/python bench/generate_speed.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
