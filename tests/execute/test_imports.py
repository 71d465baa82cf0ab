"""Who runs everything in one process imports nothing of what runs it, copies it or notes it elsewhere."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from grpo.cli import main
try:
    main()
finally:
    import grpo.manage.doctor
    print(sorted({"ray", "obstore", "moto", "wandb", "trackio", "grpo.mirror"} & set(sys.modules)))
"""


def test_a_plain_run_imports_none_of_it(project: Path) -> None:
    command = [sys.executable, "-c", CODE, "run", "--until", "1"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
