"""What a job of Slurm finds, on one machine: its variables, and commands in the place of Slurm's own."""

import os
import sys
from pathlib import Path

# Without what Slurm does: `srun` runs the command here, as the first of its tasks. A node of Ray has a core.
SRUN = """\
#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
[[ $1 == ray ]] && set -- "$@" --num-cpus=1
SLURM_PROCID=0 exec "$@"
"""
SCONTROL = """\
#!/usr/bin/env bash
echo "$@" >> requeued
"""


def environment(folder: Path) -> dict[str, str]:
    """As a job of two nodes has it; the commands are put into `folder`."""
    folder.mkdir()
    grpo = f'#!/usr/bin/env bash\nexec {sys.executable} -m grpo "$@"\n'
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "grpo": grpo}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    given = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "1",
    }
    return {**os.environ, **given, "PATH": path}
