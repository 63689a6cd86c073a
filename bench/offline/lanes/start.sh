# The first step with empty caches, by function; needs the store of whole_dump (2 min).
cat > "$W/traced.py" << 'P'
import sys
from importlib import import_module

sys.argv = ["dspark-train", *sys.argv[1:]]
try:
    import_module("dspark.train.cli").main()
finally:
    from torch._dynamo.utils import compile_times

    print(compile_times(aggregate=True), file=sys.stderr, flush=True)
P
export XDG_CACHE_HOME=$W/empty TORCHINDUCTOR_CACHE_DIR=$W/empty/inductor TRITON_CACHE_DIR=$W/empty/triton
lim train 110 "$W/site/bin/py-spy" record -r 50 -f raw -o "$R/train.raw" -- python3 "$W/traced.py" \
	--cache "$STORES/klt-1-1-2.zarr" --output "$W/draft" --recipe SmolLM2-135M --max-steps 300 \
	--val-rows 16 --val-walk-rows 2 --val-fraction 0.02 --checkpoint-freq 0.05 --keep-checkpoints 1 \
	--no-tensorboard
cp "$W/draft/train.log" "$R"
lim start 240 python3 start.py --store "$STORES/klt-1-1-2.zarr" --cases whole,parts \
	--train "--recipe SmolLM2-135M --no-tensorboard" --results "$R"
