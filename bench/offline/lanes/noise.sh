# What one vLLM engine's states differ by from dump to dump, at Qwen3-4B's shapes (4 min).
export PYTHONPATH=$W/path:$W/vllm:$W/site VLLM_USE_FLASHINFER_SAMPLER=0
[ -d "$W/qwen3-4b" ] || lim shapes 120 python3 shapes.py --kind qwen3-4b --tokenizer "$W/smol" \
	--out "$W/qwen3-4b" --device cuda
lim noise 330 python3 dump_parallel.py --target "$W/qwen3-4b" --data "$W/corpus.jsonl" \
	--rows "${ROWS:-1500}" --copies 1 --sizes 1 --codec rotated-4-4 --scratch /dev/shm --name noise \
	--engine-arg enforce_eager=true --engine-arg gpu_memory_utilization=0.6
cp "$SOURCE/bench/results/noise.json" "$R"
