# Ours and DeepSpec's from corpus to draft (17 min at these sizes; empty caches).
python3 -c "import torch, transformers; torch.zeros(1).cuda()"
export XDG_CACHE_HOME=$W/empty_e TORCHINDUCTOR_CACHE_DIR=$W/empty_e/inductor TRITON_CACHE_DIR=$W/empty_e/triton
lim end_to_end "${LIMIT:-1200}" python3 end_to_end.py --model "$W/smol" --data "$W/corpus.jsonl.gz" \
	--work "$W/e2e" --peer "$W/deepspec" --dump "--limit ${ROWS:-18000} --codec small" \
	--train "--recipe SmolLM2-135M --max-steps ${STEPS:-1100} --val-rows 16 --val-walk-rows 0 --workers 12" \
	--peer-flags "--steps ${PEER_STEPS:-3600} --workers 8 --no-compile" --every 0.25 --results "$R"
cp "$W"/e2e/{log.txt,hs.zarr.log,peer.log,ours/train.log} "$R"
