"""A corpus several times over: ``copies.py IN.jsonl OUT.jsonl TIMES``. The first message of each
copy begins with its number, so that no two rows are equal.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from dump_vllm import copied

source, out, times = sys.argv[1:]
copied(source, sys.maxsize, int(times), Path(out))
