# What the loop's thread spends on its rows (1 min): a dump of 6,000 rows, then the feed alone and under
# py-spy.
lim dump 60 python3 -m dspark.dump --model "$W/smol" --data "$W/corpus.jsonl" --limit 6000 \
	--codec klt-1-1-2 --output "$W/feed.zarr"
feed=(feed.py --store "$W/feed.zarr" --results "$R" --steps 300 --train)
for workers in 8 14; do
	lim "feed_$workers" 90 python3 "${feed[@]}" "--recipe SmolLM2-135M --no-tensorboard --workers $workers" \
		--name "feed_$workers"
done
lim spied 90 "$W/site/bin/py-spy" record -r 400 -f raw -o "$R/feed.raw" -- python3 "${feed[@]}" \
	"--recipe SmolLM2-135M --no-tensorboard --workers 12" --name feed_spied
