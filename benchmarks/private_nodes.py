"""A Ray cluster whose nodes share no files, on one machine, and a local S3 server that they all reach.

Each node has a mount namespace, with a file system of its own at /priv that holds its temporary files, home and caches,
and a process namespace, so that killing its first process kills the node. All are in one network namespace that has the
loopback interface only. It takes the rights of root, and what `pip install -e '.[dev]'` installs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PRIVATE = "/priv"  # on each node something else
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
PORT = 6379
JOBS = "http://127.0.0.1:8265"  # address of the job server, on each node
_CPUS = 3
_START_S = 300
_ATTEMPTS = 3
_SERVER = """
import sys
from pathlib import Path
from tests.s3 import serve
with serve(Path(sys.argv[1])) as s3:
    print(s3.endpoint, flush=True)
    sys.stdin.read()
"""


def why_not() -> str:
    """Why such nodes cannot be made here; empty: they can."""
    if missing := [name for name in ("unshare", "nsenter", "ip") if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    tried = ["unshare", "-n", "-m", "-p", "-f", "sh", "-c", f"mkdir -p {PRIVATE} && mount -t tmpfs none {PRIVATE}"]
    done = subprocess.run(tried, capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"namespaces are not allowed here: {done.stderr.strip()}"


class PrivateNodes:
    """A network, an S3 server in it, and the nodes of a cluster, which can be killed and replaced.

    Args:
        folder: folder of the bucket and of the nodes' logs.
        jobs: let the head have a job server.

    Attributes:
        bucket: folder that holds the files of the bucket.
        server: process of the S3 server.
        nodes: the nodes that run, by name; A is the head.
    """

    def __init__(self, folder: Path, jobs: bool = False):
        self.folder, self.bucket = folder, folder / "bucket"
        self._dashboard = f"--include-dashboard={str(jobs).lower()}"
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._stack = ExitStack()
        self.env = {
            **os.environ,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "TMPDIR": f"{PRIVATE}/tmp",
            "HOME": f"{PRIVATE}/home",
            "RAYDET_CACHE": f"{PRIVATE}/cache",
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": f"127.0.0.1:{PORT}",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
            "RAY_health_check_period_ms": "2000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_raylet_start_wait_time_s": str(_START_S),  # of a busy machine; by default 10 s
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",  # the nodes' logs are read while they run
        }

    def __enter__(self) -> PrivateNodes:
        self._network = subprocess.Popen(["unshare", "-n", "sleep", "infinity"])
        self._stack.callback(self._end, self._network)
        deadline = time.monotonic() + 10
        here = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{self._network.pid}/ns/net") == here:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        subprocess.run([*self._inside(), "ip", "link", "set", "lo", "up"], check=True)
        self.server = subprocess.Popen(
            [*self._inside(), sys.executable, "-c", _SERVER, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # it tells of each connection that a killed node leaves
            text=True,
            env=self.env | {"TMPDIR": "/tmp"},
            cwd=ROOT,
        )
        self._stack.callback(self._end, self.server)
        assert self.server.stdout is not None
        self.endpoint = self.server.stdout.readline().strip()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill(*self.nodes)
        self._stack.close()

    def uri(self, path: str) -> str:
        """Address of a folder in the bucket, for raydet."""
        return f"s3://bucket/{path}?endpoint_override={self.endpoint}&scheme=http"

    def start(self, *names: str) -> None:
        """Start nodes with empty disks, and wait until the cluster has them."""
        for name in names:
            options = f"--address=127.0.0.1:{PORT} --num-cpus={_CPUS} --labels=name={name}"
            if name == "A":
                options = f"--head --port={PORT} --num-cpus=0 --temp-dir={PRIVATE}/ray {self._dashboard}"
            script = (
                f"mount -t tmpfs none {PRIVATE} && mkdir -p {PRIVATE}/tmp {PRIVATE}/home {PRIVATE}/cache && "
                f"echo {name} > {PRIVATE}/who && exec ray start --node-ip-address=127.0.0.1 "
                f"--object-store-memory=150000000 --block --disable-usage-stats {options}"
            )
            namespaces = ["unshare", "-m", "--propagation", "private", "-p", "-f", "--kill-child", "--mount-proc"]
            for _ in range(_ATTEMPTS):  # Ray gives up a node after 30 s, which a machine that is busy may take
                log = self.folder / f"{name}-{len(list(self.folder.glob('*.log')))}.log"
                with log.open("w") as file:
                    self.nodes[name] = subprocess.Popen(
                        [*self._inside(), *namespaces, "bash", "-c", script],
                        stdout=file,
                        stderr=file,
                        stdin=subprocess.DEVNULL,
                        env={key: value for key, value in self.env.items() if key != "RAY_ADDRESS"},
                        cwd=ROOT,
                    )
                deadline = time.monotonic() + _START_S
                while "Ray runtime started" not in log.read_text() and self.nodes[name].poll() is None:
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.2)
                if self.nodes[name].poll() is None:
                    break
            else:
                raise AssertionError(log.read_text())

    def kill(self, *names: str) -> None:
        """Kill nodes with all their processes; what their disks held is gone."""
        for name in names:
            self._end(self.nodes[name])
        for name in names:
            del self.nodes[name]

    def popen(self, *command: str, node: str = "A", out: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a command on a node; what it prints goes to a file, or to one pipe."""
        (first,) = children(self.nodes[node].pid)
        return subprocess.Popen(
            ["nsenter", "-t", str(first), "-n", "-m", "-p", f"--wdns={ROOT}", *command],
            stdout=out,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.env,
            cwd=ROOT,
        )

    def raydet(self, *arguments: str, node: str = "A", out: Any = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a command of raydet's on a node."""
        return self.popen(sys.executable, "-m", "raydet.cli", *arguments, node=node, out=out)

    def submit(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Submit a script of jobs/ from the head, as cluster/README.md prints it, and follow the job to its end."""
        job = ["--address", JOBS, "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml"]
        return self.popen("ray", "job", "submit", *job, "--", "python", f"jobs/{script}.py", *arguments)

    def done(self, process: subprocess.Popen[str], timeout_s: float) -> str:
        """Wait for a command, and return what it has printed; it must have succeeded."""
        said, _ = process.communicate(timeout=timeout_s)
        assert process.returncode == 0, said
        return said

    def kill_driver(self, process: subprocess.Popen[str]) -> None:
        """Kill a command that `popen` has started, as kill -9 does."""
        for child in children(process.pid):
            os.kill(child, 9)
        process.wait()

    def _inside(self) -> list[str]:
        return ["nsenter", "-t", str(self._network.pid), "-n"]

    @staticmethod
    def _end(process: subprocess.Popen[Any]) -> None:
        process.kill()
        process.wait()


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
