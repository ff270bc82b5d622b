#!/usr/bin/env python3
"""A receiver of webhooks that goes down in the middle of a run and comes back: every event arrives, in order, signed.

    usage: webhooks.py PICTURES.zip BASE_MODEL

The service is at LORASMITH and knows LORASMITH_API_KEY; its `webhook_allowed_networks` have to name 127.0.0.0/8. The
signatures are judged by the package `standardwebhooks`.
"""

import http.server
import json
import os
import pathlib
import sys
import threading
import time
import urllib.request

from standardwebhooks import Webhook, WebhookVerificationError

BASE = os.environ["LORASMITH"]
KEY = os.environ["LORASMITH_API_KEY"]
PATIENCE_S = 120


def call(method: str, path: str, body: dict | bytes | None = None, kind: str = "application/json") -> dict:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"authorization": f"Bearer {KEY}", "accept": "application/json"}
    if data is not None:
        headers["content-type"] = kind
    request = urllib.request.Request(BASE + path, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


class Receiver:
    """Keeps the messages it gets while it is up; each with whether the package believes its signature."""

    def __init__(self) -> None:
        self.messages: dict[str, dict] = {}
        self.order: list[str] = []
        self.secret = ""
        self.refused: list[str] = []
        self.raw: tuple[bytes, dict[str, str]] | None = None
        self.port = 0
        self.up()

    def up(self) -> None:
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.send_response(receiver.hear(body, headers))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def hear(self, body: bytes, headers: dict[str, str]) -> int:
        name = headers["webhook-id"]
        try:
            message = Webhook(self.secret).verify(body, headers)
        except WebhookVerificationError as error:
            self.refused.append(f"{name}: {error}")
            return 401
        if name not in self.messages:  # it may come twice: the id tells
            self.messages[name] = message
            self.order.append(name)
            self.raw = (body, headers)
        return 204

    def story(self, run: str) -> list[dict]:
        """The messages of a run in the order of their first arrival."""
        messages = [self.messages[name] for name in list(self.order)]
        return [message for message in messages if message["data"].get("run_id") == run]


def until(what: str, done) -> None:
    end = time.monotonic() + PATIENCE_S
    while not done():
        if time.monotonic() > end:
            sys.exit(f"{what}: not within {PATIENCE_S} s")
        time.sleep(0.05)


def start_run(dataset: str, model: str, steps: int) -> str:
    size = {"width_px": 128, "height_px": 128}
    settings = {"name": "hooks", "dataset_id": dataset, "base_model": model, "max_train_steps": steps, "resolution": size}
    settings["buckets"] = {"min_px": 64, "max_px": 256}
    return call("POST", "/v1/runs", settings)["id"]


def main() -> None:
    pictures, model = pathlib.Path(sys.argv[1]), sys.argv[2]
    receiver = Receiver()
    hook = call("POST", "/v1/webhooks", {"url": f"http://127.0.0.1:{receiver.port}/hook", "events": ["*"]})
    receiver.secret = hook["secret"]

    dataset = call("POST", "/v1/datasets", {"name": "hooks"})["id"]
    head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="lumo.zip"\r\n\r\n'
    form = head + pictures.read_bytes() + b"\r\n--x--\r\n"
    call("POST", f"/v1/datasets/{dataset}/images", form, "multipart/form-data; boundary=x")
    runs = [start_run(dataset, model, steps) for steps in (3, 2)]

    until("a first message", lambda: receiver.story(runs[0]))
    receiver.down()
    heard = len(receiver.order)
    until("the end of the first run", lambda: call("GET", f"/v1/runs/{runs[0]}")["state"] == "succeeded")
    assert len(receiver.order) == heard, "nobody was there to hear"
    receiver.up()
    until("the end of the second run", lambda: call("GET", f"/v1/runs/{runs[1]}")["state"] == "succeeded")

    for run in runs:
        events = call("GET", f"/v1/runs/{run}/events")["data"]
        told = [event["id"] for event in events]
        until(f"{len(told)} messages of {run}", lambda: len(receiver.story(run)) >= len(told))
        numbers = [message["data"]["id"] for message in receiver.story(run)]
        assert numbers == told, f"heard {numbers}, told {told}"
    assert not receiver.refused, receiver.refused
    # The package does judge: it refuses what was changed on the way.
    body, headers = receiver.raw
    try:
        Webhook(receiver.secret).verify(body + b" ", headers)
        sys.exit("a wrong signature was believed")
    except WebhookVerificationError:
        pass
    print(f"webhooks: {len(receiver.order)} messages of {len(runs)} runs, all signed, all in order")


if __name__ == "__main__":
    main()
