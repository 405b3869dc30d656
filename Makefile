# Two commands for a fresh machine (Python 3.11, gcc, make, PyPI): `make demo` and `make test`.
PYTHON ?= python3.11
BIN := .venv/bin
export HF_HUB_DISABLE_TELEMETRY = 1

.PHONY: demo test format lint types unit fix evidence clean

demo: .venv/installed models/smollm2.gguf
	HF_HUB_OFFLINE=1 $(BIN)/python tools/demo.py --model models/smollm2.gguf --out out/demo

test: format lint types unit

format: .venv/installed
	$(BIN)/ruff format --check .

lint: .venv/installed
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

# The network is used for nothing but fetching the model; the tests then run offline, in two
# processes of one thread each: two threads that wait for one another would fight over two cores.
unit: .venv/installed models/smollm2.gguf
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/pytest -n 2 --dist loadfile

fix: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hours; every step that has its result already is skipped, so it can be stopped and resumed.
evidence: .venv/installed models/smollm2.gguf models/gemma3-270m.gguf models/qwen2.5-coder-0.5b.gguf
	$(BIN)/python tools/evidence.py --data $(or $(DATA),../shared/data) --out evidence

models/smollm2.gguf: | .venv/installed
	$(BIN)/python tools/fetch_models.py smollm2 --out models

models/gemma3-270m.gguf: | .venv/installed
	$(BIN)/python tools/fetch_models.py gemma3 --out models

models/qwen2.5-coder-0.5b.gguf: | .venv/installed
	$(BIN)/python tools/fetch_models.py qwen25 --out models

.venv/installed: pyproject.toml constraints.txt setup.py $(wildcard hireconvert/native/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info
