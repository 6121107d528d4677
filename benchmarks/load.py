"""A load test of the documentation's server on loopback: throughput, p99, and what gets lost.

    python benchmarks/load.py --seconds 120 --out load.json

One server process with one bundle and its monitor, four clients that wait for each answer. Every
answer is compared with what the bundle says here, and one request in fifty is no image and has to
be refused. Needs fastapi, python-multipart and uvicorn. The load of the machine is recorded beside
the figures: they mean something on a quiet one.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import package
from PIL import Image
from torch import Tensor, nn

from oodkernels._files import write_text
from oodkernels.data import ToTensor
from oodkernels.deploy import Bundle
from oodkernels.detectors import Energy

PAGE = Path(__file__).parents[1] / "docs" / "tutorials" / "production.md"
BAD = 50  # one in so many requests is no image


class Grey(nn.Module):
    """A small network on the mean of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU()),
            nn.Linear(128, 10),
        ).eval()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x.mean(1, keepdim=True))
        return logits


def pictures(n: int) -> list[bytes]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(n):
        buffer = io.BytesIO()
        pixels = random.integers(256, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def form(content: bytes) -> bytes:
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    return head + content + b"\r\n--x--\r\n"


def expected(bundle: Bundle, picture: bytes) -> dict[str, Any]:
    assert bundle.transform is not None
    found = bundle(bundle.transform(Image.open(io.BytesIO(picture)))[None])
    return {"score": float(found.score), "is_ood": bool(found.is_ood)}


class Client(threading.Thread):
    """Sends one request after the other until the time is over."""

    def __init__(self, port: int, bodies: list[bytes], wanted: list[Any], until: float) -> None:
        super().__init__()
        self.port, self.bodies, self.wanted, self.until = port, bodies, wanted, until
        self.sent = self.refused = self.wrong = 0
        self.seconds: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        bad = form(b"no image")
        while time.monotonic() < self.until:
            at = self.sent % len(self.bodies)
            is_bad = self.sent % BAD == BAD - 1
            self.sent += 1
            begin = time.perf_counter()
            try:
                connection.request("POST", "/score", bad if is_bad else self.bodies[at], headers)
                answer = connection.getresponse()
                found = json.loads(answer.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.errors.append(repr(error))
                connection.close()
                continue
            self.seconds.append(time.perf_counter() - begin)
            if is_bad:
                self.refused += answer.status == 400
            else:
                wanted = self.wanted[at]
                self.wrong += {name: found.get(name) for name in wanted} != wanted


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def serve(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """The server in the documentation, in a process of its own; returns when it answers."""
    (code,) = re.findall(r'```python title="serve.py"\n(.*?)```', PAGE.read_text(), re.DOTALL)
    (folder / "serve.py").write_text(code)
    command = [sys.executable, "-m", "uvicorn", "serve:app", "--log-level", "warning"]
    environment = {**os.environ, "BUNDLE": str(folder / "bundle"), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([*command, "--port", str(port)], cwd=folder, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return server
        except OSError:
            time.sleep(0.1)
    server.kill()
    sys.exit("the server did not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if not 0 < given.seconds <= 600 or not 0 < given.clients <= 64:
        sys.exit("--seconds must be in (0, 600], --clients in 1..64")
    torch.manual_seed(0)
    model = Grey()
    names = [f"class {i}" for i in range(10)]
    bundle = Bundle(model, Energy(model=model), transform=ToTensor(8), class_names=names)
    bundle.calibrate(torch.randn(500, 3, 8, 8))
    shown = pictures(32)
    with tempfile.TemporaryDirectory() as temporary:
        folder, port = Path(temporary), free_port()
        bundle.save(folder / "bundle")
        wanted = [expected(Bundle.load(folder / "bundle"), picture) for picture in shown]
        server = serve(folder, port)
        load = os.getloadavg()[0]
        try:
            until = time.monotonic() + given.seconds
            clients = [
                Client(port, list(map(form, shown)), wanted, until) for _ in range(given.clients)
            ]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET", "/metrics")
            metrics = connection.getresponse().read().decode()
        finally:
            server.terminate()
            server.wait(30)
    seconds = np.array([s for client in clients for s in client.seconds])
    sent = sum(client.sent for client in clients)
    bad = sum(client.sent // BAD for client in clients)
    counted = int(re.findall(r"^oodk_samples_total (\d+)$", metrics, re.MULTILINE)[0])
    record = {
        "command": "python benchmarks/load.py",
        "package": {k: v for k, v in (package() or {}).items() if k in ("version", "torch")},
        "cores": os.cpu_count(),
        "load_of_the_machine_before": round(load, 1),
        "seconds": given.seconds,
        "clients": given.clients,
        "sent": sent,
        "answered": len(seconds),
        "lost": sent - len(seconds),
        "wrong": sum(client.wrong for client in clients),
        "no_images": bad,
        "refused": sum(client.refused for client in clients),
        "counted_by_the_monitor": counted,
        "per_second": round(len(seconds) / given.seconds, 1),
        "milliseconds": {
            name: round(1000 * float(np.quantile(seconds, q)), 2)
            for name, q in (("median", 0.5), ("p99", 0.99), ("most", 1.0))
        },
        "errors": sorted({error for client in clients for error in client.errors}),
    }
    write_text(given.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))
    fine = not record["lost"] and not record["wrong"] and record["refused"] == bad
    sys.exit(0 if fine and counted == sent - bad else 1)


if __name__ == "__main__":
    main()
