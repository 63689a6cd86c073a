# A whole dump of 28 M tokens beside bare prefill (2 min per codec), and how fast its store is read.
python3 offline/copies.py "$W/corpus.jsonl" "$W/many.jsonl" 5
lim whole "${LIMIT:-300}" python3 dump.py --target "$W/smol" --data "$W/many.jsonl" --parts 2 \
	--codecs "${DUMPED:-klt-1-1-2,rotated-4-4}" --output "$STORES" --keep --name whole
cp "$SOURCE/bench/results/whole.json" "$STORES"/*.log "$R"
for workers in 8 14; do
	lim "feed_$workers" 100 python3 feed.py --store "$STORES/klt-1-1-2.zarr" --steps 300 \
		--train "--recipe SmolLM2-135M --no-tensorboard --workers $workers" --name "feed_$workers" \
		--results "$R"
done
