"""A real vLLM server on 127.0.0.1 with a tiny random model: its answers mean nothing, its protocol does."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tests.tiny import qwen3_for_vllm

from grpo.models import starter_model

MODEL = "judge"
START_S = 400.0  # a minute and a half on two idle cores
# As in generate/vllm_settings.py: one process, no compiler, threads left alone.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def write_judge(folder: Path) -> Path:
    """A random Qwen3 with the starter's tokenizer and chat template; a token is a byte."""
    from transformers import Qwen3ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3ForCausalLM(qwen3_for_vllm()).save_pretrained(folder)
    starter_model.build_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def vllm_server(checkpoint: Path, log: Path) -> Iterator[str]:
    """The base URL of a server of `checkpoint`, once it answers; it is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]
    command += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", "512", "--distributed-executor-backend", "uni"]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT}, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait(server, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(url).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no answer within {START_S:g} s: {log.read_text()[-2000:]}")
