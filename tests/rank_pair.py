"""Two ranks that run one script after another, in a folder that is given.

To import torch and lightning takes longer than most scripts, so that it is done once and before the
fork; the variables are those of torchrun.
"""

import os
import runpy
import sys
import time
import traceback
from itertools import count
from pathlib import Path

import numpy
import shared  # noqa: F401 - before the fork, with all that tests import
import torch.distributed
from lightning.pytorch.utilities.rank_zero import rank_zero_only

folder, parent = Path(sys.argv[1]), os.getpid()
store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2"}
os.environ |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
for rank in "01":
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank}
    if not os.fork():
        break
else:
    sys.exit(any(os.wait()[1] for _ in "01"))
rank_zero_only.rank = int(rank)
numpy.random.seed()
for number in count():
    job = folder / str(number)
    while not (job / "script.py").exists():
        if (folder / "stop").exists() or os.getppid() != parent:
            # Left to the interpreter's exit, gloo's threads now and then abort the process.
            if torch.distributed.is_initialized() and os.getppid() == parent:
                torch.distributed.barrier()
                torch.distributed.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)
        time.sleep(0.02)
    sys.argv = [str(job / "script.py"), str(job), "2"]
    said = ""
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except BaseException:
        said = traceback.format_exc()
    (job / f"said{rank}.part").write_text(said)
    (job / f"said{rank}.part").rename(job / f".said{rank}")
