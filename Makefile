# The two commands of the README, and a few more. Everything lives in .venv; `make clean` removes what was made.
SHELL := /bin/bash
PY := .venv/bin
RECIPE ?= multisource
OVERRIDES ?=
DATA ?= $(CURDIR)/data
RUNS ?= $(CURDIR)/runs
export CONSILIUM_DATA := $(DATA)
export CONSILIUM_RUNS := $(RUNS)
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
# What the phantom needs of the overrides: where it is, how large, and how its scans are preprocessed.
PREPARE = -s 'recipe=$(RECIPE)' $(foreach o,$(filter federation.phantom% federation.data_root% preprocess% backbone%,$(OVERRIDES)),-s '$(o)')

.PHONY: simulate compare test deploy-test mutants lint resume clean

simulate: .venv/ready  ## four made-up hospitals, one model, by `flwr run`
	@case " $(OVERRIDES)" in *" federation="*) ;; *) $(PY)/consilium-centre phantom $(PREPARE) ;; esac
	@$(PY)/consilium-server simulate --recipe $(RECIPE) "$(OVERRIDES)"

compare: .venv/ready  ## federated, central and local side by side
	@case " $(OVERRIDES)" in *" federation="*) ;; *) $(PY)/consilium-centre phantom $(PREPARE) ;; esac
	@$(PY)/consilium-server compare --recipe $(RECIPE) "$(OVERRIDES)"

resume: .venv/ready  ## make resume RUN=<run id>
	@$(PY)/consilium-server resume $(RUN)

test: .venv/ready lint  ## lint, types, walls, tests
	$(PY)/pytest -n 2

deploy-test: .venv/ready  ## end-to-end deployment tests, as processes and as containers
	$(PY)/pytest -m deploy -p no:xdist -rs tests/deploy

mutants: .venv/ready  ## break the code on purpose, and see that the tests notice
	$(PY)/python -m tests.tools.mutants

lint: .venv/ready
	$(PY)/ruff format --check .
	$(PY)/ruff check .
	$(PY)/mypy
	$(PY)/lint-imports

.venv/ready: pyproject.toml deploy/constraints.txt
	test -x $(PY)/python || python3 -m venv .venv
	@echo "installing into .venv: some minutes and about 6 GB, once"
	@$(PY)/pip install -qq -c deploy/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf .venv data runs build *.egg-info
