#!/usr/bin/env python3
"""How the service answers while a run trains on all cores: latencies of `GET /v1/runs/{id}` at a fixed rate, the delay
of events in many open streams, memory of the server. Only the standard library; it starts a service of its own.

    usage: benches/service_load.py PROGRAM [--rate 200] [--seconds 20] [--streams 1000]

The client and the worker share the machine with the server: what is measured is an upper bound. A request is counted
from the moment in which it should have been sent, so that a slow answer cannot hide the requests behind it.
"""

import argparse
import asyncio
import concurrent.futures
import datetime
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--rate", type=int, default=200)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=1000)
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder:
        server, base = start(options.program, folder)
        try:
            measure(server, base, options)
        finally:
            server.terminate()
            server.wait()


def start(program: str, folder: str) -> tuple[subprocess.Popen, str]:
    environment = os.environ | {
        "LORASMITH_DATA_DIR": folder,
        "LORASMITH_MODELS_DIR": str(ROOT / "examples/demo"),
        "LORASMITH_DEVICE": "cpu",
        "LORASMITH_RATE_LIMIT_PER_S": "0",
    }
    server = subprocess.Popen(
        [program, "serve", "--bind", "127.0.0.1:0"],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in server.stdout:
        if "http://" in line:
            return server, line[line.index("http://") :].split()[0]
    sys.exit("the service does not start")


def call(base: str, path: str, body: dict | bytes | None = None, kind: str = "application/json") -> dict:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(base + path, data, {"content-type": kind} if data is not None else {})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def start_run(base: str) -> str:
    """A run that trains for longer than is measured."""
    dataset = call(base, "/v1/datasets", {"name": "load"})["id"]
    parts = []
    for picture in sorted((ROOT / "examples/demo/dataset/10_lumo").glob("*.png")):
        head = f'--x\r\ncontent-disposition: form-data; name="f"; filename="{picture.name}"\r\n\r\n'
        parts.append(head.encode() + picture.read_bytes() + b"\r\n")
    form = b"".join(parts) + b"--x--\r\n"
    call(base, f"/v1/datasets/{dataset}/images", form, "multipart/form-data; boundary=x")
    size = {"width_px": 128, "height_px": 128}
    settings = {"name": "load", "dataset_id": dataset, "base_model": "base", "max_train_steps": 100000, "batch_size": 4}
    buckets = {"enabled": False, "min_px": 64, "max_px": 256}
    run = call(base, "/v1/runs", settings | {"resolution": size, "buckets": buckets})["id"]
    while call(base, f"/v1/runs/{run}")["progress"]["step"] < 2:
        time.sleep(0.2)
    return run


def measure(server: subprocess.Popen, base: str, options: argparse.Namespace) -> None:
    run = start_run(base)
    rows = [("server, run training", "memory", f"{memory_mb(server.pid, 'VmRSS'):.0f} MB")]
    path = f"/v1/runs/{run}"
    answers = asyncio.run(requests(base, path, options))
    rows.append((f"GET {path[:8]}/{{id}}, {options.rate}/s", *percentiles(answers)))
    answers, delays, opened = asyncio.run(both(base, path, options))
    rows.append((f"the same, {opened} streams open", *percentiles(answers)))
    rows.append((f"{len(delays)} events in {opened} streams", *percentiles(delays)))
    rows.append(("server, after it", "memory, at most", f"{memory_mb(server.pid, 'VmHWM'):.0f} MB"))
    print(f"\n{datetime.date.today()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    call(base, f"{path}/cancel", {})


def memory_mb(pid: int, field: str) -> float:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1000
    return float("nan")


def percentiles(seconds: list[float]) -> tuple[str, str]:
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000
    return "p50, p99, most", f"{at(0.5):.1f}, {at(0.99):.1f}, {at(1):.1f} ms"


async def requests(base: str, path: str, options: argparse.Namespace) -> list[float]:
    """Sends at the rate over 16 kept connections and returns how long each answer took."""
    queue: asyncio.Queue = asyncio.Queue()
    answers: list[float] = []
    host, port = base.removeprefix("http://").split(":")
    text = f"GET {path} HTTP/1.1\r\nhost: {host}:{port}\r\n\r\n".encode()

    async def connection() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while (due := await queue.get()) is not None:
            writer.write(text)
            head = await reader.readuntil(b"\r\n\r\n")
            assert b" 200 " in head.split(b"\r\n")[0], head
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.split(b":")[1]))
            answers.append(time.monotonic() - due)
        writer.close()

    connections = [asyncio.create_task(connection()) for _ in range(16)]
    began = time.monotonic()
    for number in range(options.rate * options.seconds):
        due = began + number / options.rate
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        queue.put_nowait(due)
    for _ in connections:
        queue.put_nowait(None)
    await asyncio.gather(*connections)
    return answers


def answers_of(base: str, path: str, options: argparse.Namespace) -> list[float]:
    return asyncio.run(requests(base, path, options))


async def both(base: str, path: str, options: argparse.Namespace) -> tuple[list[float], list[float], int]:
    """The same with open streams; also returns how old each event was when a stream had it."""
    host, port = base.removeprefix("http://").split(":")
    heard: list[tuple[int, float]] = []
    opened = 0

    async def stream() -> None:
        nonlocal opened
        reader, writer = await asyncio.open_connection(host, int(port))
        head = f"GET {path}/events?after={last} HTTP/1.1\r\nhost: {host}\r\naccept: text/event-stream\r\n\r\n"
        writer.write(head.encode())
        assert b" 200 " in (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0]
        opened += 1
        async for line in reader:
            if line.startswith(b"id: "):
                heard.append((int(line[4:]), time.time()))

    last = await asyncio.to_thread(newest_event, base, path)
    streams = [asyncio.create_task(stream()) for _ in range(options.streams)]
    while opened < options.streams:
        for task in streams:
            if task.done():
                task.result()
        await asyncio.sleep(0.1)
    before = await asyncio.to_thread(newest_event, base, path)
    with concurrent.futures.ProcessPoolExecutor(1) as apart:  # the streams' own work must not delay its clock
        answers = await asyncio.get_running_loop().run_in_executor(apart, answers_of, base, path, options)
    for task in streams:
        task.cancel()
    await asyncio.gather(*streams, return_exceptions=True)
    made = times(base, path, before)
    delays = [at - made[number] for number, at in heard if number in made]
    seen = {number for number, _ in heard if number in made}
    complete = [number for number in made if number < max(seen, default=0)]
    missing = sum(options.streams for number in complete if number not in seen)
    counted = len([number for number, _ in heard if number in complete])
    if missing or counted != len(complete) * options.streams:
        print(f"NOT EVERY EVENT CAME: {counted} of {len(complete) * options.streams}")
    return answers, delays, opened


def newest_event(base: str, path: str) -> int:
    return max(times(base, path, 0), default=0)


def times(base: str, path: str, after: int) -> dict[int, float]:
    """When each event was made, in seconds, by the clock of the machine."""
    made = {}
    while True:
        request = urllib.request.Request(f"{base}{path}/events?after={after}", headers={"accept": "application/json"})
        with urllib.request.urlopen(request) as answer:
            events = json.load(answer)["data"]
        if not events:
            return made
        for event in events:
            made[event["id"]] = datetime.datetime.fromisoformat(event["created_at"]).timestamp()
        after = events[-1]["id"]


if __name__ == "__main__":
    main()
