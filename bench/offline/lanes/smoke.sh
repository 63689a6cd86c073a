# New code once over, on random weights of SmolLM2's shapes, with empty caches (2 min): common.tar and
# meta are all it needs.
export XDG_CACHE_HOME=$W/empty_s TORCHINDUCTOR_CACHE_DIR=$W/empty_s/inductor TRITON_CACHE_DIR=$W/empty_s/triton
lim shapes 60 python3 shapes.py --kind smollm2 --tokenizer "$W/meta" --out "$W/random" --device cuda
lim dump 90 python3 -m dspark.dump --model "$W/random" --data "$W/corpus.jsonl" --limit 3000 \
	--codec small --output "$W/random.zarr"
for n in first second; do
	lim "train_$n" 90 python3 -m dspark.train --cache "$W/random.zarr" --output "$W/random_$n" \
		--recipe SmolLM2-135M --max-steps 150 --val-rows 16 --val-walk-rows 2 --checkpoint-freq 0.1 \
		--keep-checkpoints 1 --no-tensorboard --workers 12
	cp "$W/random_$n/train.log" "$R/train_$n.txt"
done
cp "$W/random.zarr.log" "$R"
