#!/usr/bin/env python3
"""Compares lorasmith's training step with torch's (peer/step.py) on this machine, and prints markdown.

Each program runs as a whole process, in alternation, so that a machine that is busy or hot for a while is so for both:
lorasmith, torch, lorasmith, torch, … Both train the same LoRA on the same file of random weights, which
`lorasmith bench` writes at its first run. A number is the median of its rounds, a ratio that of those numbers, with the
smallest and largest ratio of a round beside it; below 1 lorasmith needs less. Append the output to RESULTS.md:

    cargo build --release
    pip install -r benches/peer/requirements.txt
    benches/compare.py --rounds 3 --resolution 512 >> benches/RESULTS.md
"""
import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
GIB = 1024 ** 3
# What is compared: label, where it is in the JSON, divisor, decimals.
ROWS = [
    ("seconds per step, median", ("step_s", "median"), 1, 2),
    ("seconds per step, fastest", ("step_s", "min"), 1, 2),
    ("CPU seconds per step, median", ("step_cpu_s", "median"), 1, 2),
    ("CPU seconds per step, fastest", ("step_cpu_s", "min"), 1, 2),
    ("start to first step, seconds", ("start", "wall_s"), 1, 1),
    ("start to first step, CPU seconds", ("start", "cpu_s"), 1, 1),
    ("first step, seconds", ("first_step", "wall_s"), 1, 1),
    ("peak memory of the process, GiB", ("peak_rss_bytes",), GIB, 2),
    ("device memory reserved, GiB", ("device_memory", "reserved_bytes"), GIB, 2),
    ("data, seconds", ("phases", "data_s"), 1, 3),
    ("text encoder, seconds", ("phases", "text_encoder_s"), 1, 2),
    ("forward, seconds", ("phases", "forward_s"), 1, 2),
    ("backward, seconds", ("phases", "backward_s"), 1, 2),
    ("optimizer, seconds", ("phases", "optimizer_s"), 1, 3),
]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lorasmith", default=str(HERE.parent / "target/release/lorasmith"), help="the program")
    parser.add_argument("--python", default=sys.executable, help="a Python with peer/requirements.txt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of a round")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--gradient-checkpointing", default="none")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--peer-precision", help="torch's, where it differs from --precision")
    parser.add_argument("--device", default="cpu", help="lorasmith's device")
    parser.add_argument("--peer-device", default="cpu", help="torch's device")
    parser.add_argument("--model-file", help="where the random weights are kept")
    args = parser.parse_args()
    if args.rounds < 1 or args.steps < 1:
        parser.error("--rounds and --steps are at least 1")
    return args


def run(command):
    """The JSON that a program prints; ends with what it said when it fails."""
    print("+", shlex.join(command), file=sys.stderr)
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    except OSError as error:
        sys.exit(f"{command[0]}: {error}; build with `cargo build --release`, or name it with --lorasmith or --python")
    if done.returncode != 0:
        sys.exit(f"{command[0]}: exit status {done.returncode}, see above")
    return json.loads(done.stdout)


def measure(args):
    """Alternating rounds: lorasmith's and torch's reports."""
    same = ["--resolution", args.resolution, "--steps", args.steps, "--batch-size", args.batch_size,
            "--rank", args.rank, "--gradient-checkpointing", args.gradient_checkpointing]
    file = ["--model-file", args.model_file] if args.model_file else []
    ours, theirs = [], []
    for _ in range(args.rounds):
        ours.append(run([str(word) for word in [
            args.lorasmith, "bench", "--json", "--precision", args.precision, "--device", args.device, *same, *file]]))
        theirs.append(run([str(word) for word in [
            args.python, HERE / "peer/step.py", "--model", ours[0]["model"], "--device", args.peer_device,
            "--precision", args.peer_precision or args.precision, *same]]))
    return ours, theirs


def value(report, place):
    for key in place:
        report = (report or {}).get(key)
    return report


def table(ours, theirs):
    lines = ["| | lorasmith | torch | ratio | range of the rounds |", "|---|--:|--:|--:|--:|"]
    for label, place, divisor, decimals in ROWS:
        a = [value(report, place) for report in ours]
        b = [value(report, place) for report in theirs]
        if None in a and None in b or place[0] == "phases" and None in a + b:
            continue  # one side alone is worth a row, but not the parts of a step
        number = lambda values: None if None in values else statistics.median(values) / divisor
        cell = lambda x: "" if x is None else f"{x:.{decimals}f}"
        a_middle, b_middle = number(a), number(b)
        ratio = spread = ""
        if a_middle is not None and b_middle:
            ratio = f"{a_middle / b_middle:.2f}"
            ratios = [x / y for x, y in zip(a, b) if y]
            spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        lines.append(f"| {label} | {cell(a_middle)} | {cell(b_middle)} | {ratio} | {spread} |")
    return "\n".join(lines)


def processor():
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit():
    """The checkout's commit, marked when there is more than it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"


def command():
    """The call, without where things are on this machine."""
    words, local = [], False
    for word in sys.argv[1:]:
        name = word.split("=")[0]
        if local or name in ("--lorasmith", "--python", "--model-file"):
            local = not local and "=" not in word
        else:
            words.append(word)
    return shlex.join(["benches/compare.py", *words])


def setting(ours, theirs, args):
    """What the table is of."""
    checkpointing = {"none": "no gradient checkpointing"}.get(
        args.gradient_checkpointing, f"gradient checkpointing {args.gradient_checkpointing}")
    precision = ours["precision"]
    if theirs["precision"] != precision:
        precision += f" (torch {theirs['precision']})"
    libraries = ", ".join(f"{name} {version}" for name, version in theirs["libraries"].items())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"""## {args.resolution} × {args.resolution}, batch {args.batch_size}, {precision}, {checkpointing}

- {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}
- lorasmith {ours["version"]} ({commit()}) on {ours["device"]} ({ours["device_name"]})
- torch {theirs["version"]}, {libraries} on {theirs["device"]} ({theirs["device_name"]})
- Stable Diffusion 1.5 with random weights; rank {args.rank}: {ours["trained_parameters"]:,} parameters \
(torch {theirs["trained_parameters"]:,}); {args.rounds} rounds of 1 + {args.steps} steps
- `{command()}`
"""


def main():
    args = arguments()
    ours, theirs = measure(args)
    print(setting(ours[0], theirs[0], args))
    print(table(ours, theirs))
    print()


if __name__ == "__main__":
    main()
