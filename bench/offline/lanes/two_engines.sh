# vLLM at Qwen3-4B's shapes, one engine and two (two GPUs, 10 min).
export PYTHONPATH=$W/path:$W/vllm:$W/site VLLM_USE_FLASHINFER_SAMPLER=0
lim shapes 120 python3 shapes.py --kind qwen3-4b --tokenizer "$W/smol" --out "$W/qwen3-4b" --device cuda
lim two "${LIMIT:-780}" python3 dump_parallel.py --target "$W/qwen3-4b" --data "$W/corpus.jsonl" \
	--rows 18000 --copies "${COPIES:-2}" --sizes 1,2 --codec rotated-4-4 --scratch /dev/shm \
	--engine-arg enforce_eager=true --engine-arg gpu_memory_utilization=0.6 --name two
cp "$SOURCE/bench/results/two.json" "$R"
