# Where the seconds of a dump, a training and a score go (6 min).
lim phases 420 python3 start_phases.py --model "$W/smol" --data "$W/corpus.jsonl" \
	--dump "--limit 11000 --codec small" --profile --results "$R" --train "--recipe SmolLM2-135M \
	--max-steps 60 --val-rows 3 --val-walk-rows 0 --workers 12 --checkpoint-freq 0.5"
