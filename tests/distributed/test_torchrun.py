"""Started by torchrun, with one agent for each of two "machines"."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from .test_launch import MODEL, ROOT

SCRIPT = (
    MODEL
    + """
if __name__ == "__main__":
    pl.seed_everything(1)
    made = trainer(num_nodes=2)  # a launcher has started several: "auto" is ddp, with all of them
    model = Model()
    made.fit(model, rows())
    made.validate(model, rows(), verbose=False)
    strategy = made.strategy
    say(
        "rank", made.global_rank, made.local_rank, made.node_rank, made.world_size, type(strategy).__name__,
        len(strategy.parallel_devices), made.global_step, f"{made.callback_metrics['val'].item():.6f}",
    )
"""
)


def test_two_agents(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    agents = []
    for node in range(2):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=1",
            "--master-addr=127.0.0.1", f"--master-port={port}", "train.py",
        ]  # fmt: skip
        agents.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    try:
        ended = [agent.communicate(timeout=120) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it ends its worker too
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], ended
    lines = sorted(line for out, _ in ended for line in out.splitlines() if line.startswith("rank "))
    first, second = (line.split() for line in lines)
    assert first[1:8] == ["0", "0", "0", "2", "DDPStrategy", "1", "4"]
    assert second[1:8] == ["1", "0", "1", "2", "DDPStrategy", "1", "4"]
    assert first[8] == second[8]
    assert "Warning" not in ended[0][1] + ended[1][1]
