"""``dspark.tools.vllm_serve`` that also writes down every block vLLM drafts, to the file that
``DSPARK_TRACE`` names.

A line a proposal: [request id, position of the anchor, anchor token, drafted tokens]. vLLM also drafts after
the last verified block of a request; that proposal is never judged.
"""

from __future__ import annotations

import json
import os
import sys
from functools import wraps
from typing import Any

from vllm.v1.worker.gpu.spec_decode.dspark.speculator import DSparkSpeculator

from dspark.tools import vllm_serve

_propose = DSparkSpeculator.propose


@wraps(_propose)
def propose(self: Any, input_batch: Any, *args: Any, dummy_run: bool = False, **kwargs: Any) -> Any:
    drafted = _propose(self, input_batch, *args, dummy_run=dummy_run, **kwargs)
    if not dummy_run:
        with open(os.environ["DSPARK_TRACE"], "a") as file:
            for i, request in enumerate(input_batch.req_ids):
                anchor = i * self.num_query_per_req
                position, token = (
                    int(b[anchor]) for b in (self.input_buffers.positions, self.input_buffers.input_ids)
                )
                file.write(json.dumps([request, position, token, drafted[i].tolist()]) + "\n")
    return drafted


DSparkSpeculator.propose = propose
vllm_serve.main(sys.argv[1:])
