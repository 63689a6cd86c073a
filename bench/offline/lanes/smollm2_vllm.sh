# SmolLM2 through vLLM: plain prefill and the dump in one process, then its engine apart, then two and
# three engines on the card (12 min; every ratio is to the first one's prefill).
export PYTHONPATH=$W/path:$W/vllm:$W/site VLLM_USE_FLASHINFER_SAMPLER=0
run() { # NAME FLAGS...
	local name=$1
	shift
	lim "$name" 240 python3 dump_vllm.py --target "$W/smol" --data "$W/corpus.jsonl" --rows 3000 \
		--copies 8 --codec rotated-4-4 --engine-arg enforce_eager=true --scratch /dev/shm --passes 2 \
		--name "$name" "$@"
	cp "$SOURCE/bench/results/$name.json" "$R"
}
run alone
run apart --apart --prefill 1
run worker_apart --apart --prefill 1 --engine-arg distributed_executor_backend=mp
run two --data-parallel-size 2 --prefill 1
run three --data-parallel-size 3 --prefill 1
