#!/usr/bin/env python3
"""How the service takes uploads: a large zip of pictures (time, memory of the server, next to what the disk does), the
same in parts, and many small uploads at the same time (nothing lost, nothing doubled). Only the standard library; it
starts a service of its own.

    usage: benches/upload_load.py PROGRAM [--gigabytes 3] [--images 2000] [--clients 200] [--folder DIR]

The client shares the machine with the server. Pictures are PNGs of noise: they do not compress, and every one is
decoded to its end by the server. `sha256sum` and a copy with fsync of the same bytes say what the machine can do.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import hashlib
import http.client
import json
import os
import pathlib
import random
import struct
import subprocess
import tempfile
import threading
import time
import zipfile
import zlib

from service_load import call, memory_mb, start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        archive = pathlib.Path(folder) / "large.zip"
        make_archive(archive, options)
        rows = [("the zip", f"{options.images} PNGs", f"{archive.stat().st_size / 1e9:.2f} GB"), *disk(archive)]
        data = pathlib.Path(folder) / "data"
        data.mkdir()
        server, base = start(str(pathlib.Path(options.program).resolve()), str(data))
        try:
            watch = Watch(server.pid)
            rows += large(base, archive, options, watch)
            rows += in_parts(base, archive, options, watch)
            rows += small(base, options)
        finally:
            server.terminate()
            server.wait()
    print(f"\n{datetime.date.today()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}\n")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def png(seed: int, side: int) -> bytes:
    """Noise, so that nothing is compressed; another seed is another picture."""
    noise = random.Random(seed).randbytes(side * side * 3)
    rows = b"".join(b"\0" + noise[at : at + side * 3] for at in range(0, len(noise), side * 3))
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b"")


def make_archive(path: pathlib.Path, options: argparse.Namespace) -> None:
    side = int((options.gigabytes * 1e9 / options.images / 3) ** 0.5)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number in range(options.images):
            archive.writestr(f"10_noise/{number:05}.png", png(number, side))
            archive.writestr(f"10_noise/{number:05}.txt", f"noise number {number}")


def disk(archive: pathlib.Path) -> list[tuple[str, ...]]:
    gigabytes = archive.stat().st_size / 1e9
    copy = archive.with_suffix(".copy")
    began = time.monotonic()
    with archive.open("rb") as source, copy.open("wb") as target:
        while block := source.read(1 << 20):
            target.write(block)
        os.fsync(target.fileno())
    copied = time.monotonic() - began
    copy.unlink()
    began = time.monotonic()
    with archive.open("rb") as source:
        hashlib.file_digest(source, "sha256")
    hashed = time.monotonic() - began
    return [
        ("disk: copy with fsync", f"{copied:.1f} s", f"{gigabytes / copied:.2f} GB/s"),
        ("SHA-256, one core", f"{hashed:.1f} s", f"{gigabytes / hashed:.2f} GB/s"),
    ]


class Watch:
    """The most memory of its own that a process had since the last look: what it shares with the page cache is not its."""

    def __init__(self, pid: int) -> None:
        self.pid, self.most = pid, 0.0
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while pathlib.Path(f"/proc/{self.pid}/status").exists():
            with contextlib.suppress(OSError):
                self.most = max(self.most, memory_mb(self.pid, "RssAnon"))
            time.sleep(0.02)

    def take(self) -> str:
        most, self.most = self.most, 0.0
        return f"{most:.0f} MB"


def request(base: str, method: str, path: str, body, headers: dict) -> dict:
    connection = http.client.HTTPConnection(base.removeprefix("http://"), timeout=3600)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status in (200, 201), (answer.status, text[:500])
    return json.loads(text)


def form(name: str, path: pathlib.Path) -> tuple[object, dict]:
    head = f'--x\r\ncontent-disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode()
    tail = b"\r\n--x--\r\n"

    def blocks():
        yield head
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                yield block
        yield tail

    length = len(head) + path.stat().st_size + len(tail)
    return blocks(), {"content-type": "multipart/form-data; boundary=x", "content-length": str(length)}


def large(base: str, archive: pathlib.Path, options: argparse.Namespace, watch: Watch) -> list[tuple[str, ...]]:
    dataset = call(base, "/v1/datasets", {"name": "large"})["id"]
    body, headers = form("large.zip", archive)
    watch.take()
    began = time.monotonic()
    answer = request(base, "POST", f"/v1/datasets/{dataset}/images", body, headers)
    took = time.monotonic() - began
    check(base, dataset, answer, options)
    gigabytes = archive.stat().st_size / 1e9
    return [("one upload", f"{took:.1f} s, {gigabytes / took:.2f} GB/s", f"at most {watch.take()}")]


def in_parts(base: str, archive: pathlib.Path, options: argparse.Namespace, watch: Watch) -> list[tuple[str, ...]]:
    dataset = call(base, "/v1/datasets", {"name": "parts"})["id"]
    size = archive.stat().st_size
    upload = call(base, f"/v1/datasets/{dataset}/uploads", {"name": "large.zip", "size_bytes": size})
    path = f"/v1/datasets/{dataset}/uploads/{upload['id']}"
    watch.take()
    began = time.monotonic()
    with archive.open("rb") as file:
        number = 0
        while block := file.read(64 << 20):
            number += 1
            headers = {"content-type": "application/octet-stream"}
            request(base, "PUT", f"{path}/parts/{number}", block, headers)
    sent = time.monotonic() - began
    answer = request(base, "POST", f"{path}/complete", None, {})
    took = time.monotonic() - began
    check(base, dataset, answer, options)
    return [(f"{number} parts of 64 MiB", f"{sent:.1f} s, complete {took - sent:.1f} s", f"at most {watch.take()}")]


def check(base: str, dataset: str, answer: dict, options: argparse.Namespace) -> None:
    expected = {"images": options.images, "captions": options.images, "duplicates": 0, "refused": 0, "warnings": 0}
    assert answer["summary"] == expected, answer["summary"]
    found = call(base, f"/v1/datasets/{dataset}")
    assert found["images"] == found["captioned_images"] == options.images, found


def small(base: str, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Each client sends one picture of its own and one that all send."""
    dataset = call(base, "/v1/datasets", {"name": "small"})["id"]
    shared = png(10**9, 64)

    def client(number: int) -> tuple[float, int]:
        files = [("shared.png", shared), (f"{number}.png", png(10**6 + number, 64)), (f"{number}.txt", b"a caption")]
        body = b"".join(
            f'--x\r\ncontent-disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + content + b"\r\n"
            for name, content in files
        )
        headers = {"content-type": "multipart/form-data; boundary=x"}
        began = time.monotonic()
        answer = request(base, "POST", f"/v1/datasets/{dataset}/images", body + b"--x--\r\n", headers)
        assert answer["summary"]["refused"] == 0, answer
        return time.monotonic() - began, answer["summary"]["images"]

    with concurrent.futures.ThreadPoolExecutor(options.clients) as pool:
        began = time.monotonic()
        answers = list(pool.map(client, range(options.clients)))
        took = time.monotonic() - began
    taken = sum(images for _, images in answers)
    found = call(base, f"/v1/datasets/{dataset}")
    assert taken == found["images"] == options.clients + 1, (taken, found)
    assert found["captioned_images"] == options.clients, found
    slowest = max(seconds for seconds, _ in answers)
    return [(f"{options.clients} small uploads at once", f"{took:.1f} s", f"the slowest {slowest:.1f} s")]


if __name__ == "__main__":
    main()
