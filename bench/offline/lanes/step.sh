# The training step at Qwen3-4B's shapes, fast path against slow (90 s).
lim step 150 python3 step.py --results "$R"
