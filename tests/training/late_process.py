"""Resumes a training in two processes of which one comes late: run by `torchrun`.

`python -m torch.distributed.run --nproc_per_node=2 -m tests.training.late_process DATA OUT` writes
a line of each process: its rank and the last step of the history that it has read.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from accelerate import PartialState

from attn_kd.training import train_detector
from attn_kd.training.records import RECORD_FILE, RunRecord

LATE = 3.0  # seconds; the other process would have saved the model, and left, in less


def main(data: str, out: str) -> None:
    rank = PartialState(cpu=True).process_index  # the processes have met before the run begins
    config = RunRecord.load(Path(out) / RECORD_FILE).config
    if rank == 1:
        time.sleep(LATE)
    run = train_detector(config, data, out, resume=True, device="cpu")
    sys.stdout.write(f"{rank}: step {run.history[-1]['step']}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
