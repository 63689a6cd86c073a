# SmolLM2 through vLLM, in variants: VARIANTS of N[_mp]. N engines on the card; their workers apart
# from their schedulers. Plain prefill is measured with the first, and every ratio is to it (3 min,
# then 2 min each).
export PYTHONPATH=$W/path:$W/vllm:$W/site VLLM_USE_FLASHINFER_SAMPLER=0
prefill=()
for name in ${VARIANTS:-1_mp 2 2_mp 3_mp}; do
	flags=(--data-parallel-size "${name%%_*}")
	[[ $name == *_mp* ]] && flags+=(--engine-arg distributed_executor_backend=mp)
	lim "smol_$name" 280 python3 dump_vllm.py --target "$W/smol" --data "$W/corpus.jsonl" \
		--rows 3000 --copies "${COPIES:-16}" --codec "${CODEC:-klt-1-1-2}" --scratch /dev/shm \
		--engine-arg enforce_eager=true --passes 2 --name "smol_$name" "${prefill[@]}" "${flags[@]}"
	written=$SOURCE/bench/results/smol_$name.json
	[ -e "$written" ] || continue
	cp "$written" "$R"
	[ ${#prefill[@]} = 0 ] && prefill=(--prefill "$(python3 -c "import json
print(json.load(open('$written'))['results']['prefill_tokens_per_s'])")")
done
