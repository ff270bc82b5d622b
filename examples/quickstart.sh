#!/usr/bin/env bash
# From pictures to a LoRA with curl and jq, against a running service.
#
#   usage: quickstart.sh PICTURES.zip BASE_MODEL [OUTPUT [STEPS [RESOLUTION]]]
#
# PICTURES.zip is in kohya layout: 10_lumo/*.png with *.txt captions, and perhaps 10_lumo_reg/. BASE_MODEL is a name or
# id of `GET /v1/models`. OUTPUT gets the ending `.safetensors`. The address comes from LORASMITH, http://127.0.0.1:7870
# when unset; the key from LORASMITH_API_KEY, where the service wants one.
set -euo pipefail
BASE=${LORASMITH:-http://127.0.0.1:7870}
PICTURES=$1 MODEL=$2 OUTPUT=${3:-my-lora} STEPS=${4:-1000} SIZE=${5:-512}
NAME=$(basename "$OUTPUT")

call() { curl -sS --fail-with-body ${LORASMITH_API_KEY:+-H "authorization: Bearer $LORASMITH_API_KEY"} "$@"; }
json() { call -H 'content-type: application/json' "$@"; }

echo "== models"
json "$BASE/v1/models" | jq -r '.data[] | "\(.name)  \(.family)  \(if .trainable then "" else .problem end)"'

DATASET=$(json "$BASE/v1/datasets" -d "$(jq -n --arg name "$NAME" '{name: $name}')" | jq -r .id)
echo "== upload to dataset $DATASET"
call "$BASE/v1/datasets/$DATASET/images" -F "file=@$PICTURES" |
  jq -c '.summary, (.files[] | select(.outcome == "refused"))'

IMAGE=$BASE/v1/datasets/$DATASET/images/$(call "$BASE/v1/datasets/$DATASET/images?limit=1" | jq -r '.data[0].id')
echo "== correct a caption"
ETAG=$(call -o /dev/null -D - "$IMAGE" | tr -d '\r' | sed -n 's/^etag: //Ip')
PATCH=$(call "$IMAGE" | jq '{caption: "\(.caption // "lumo"), smiling"}')
# With If-Match nobody's change in between is overwritten: it would be a 412.
call -X PATCH -H 'content-type: application/merge-patch+json' -H "if-match: $ETAG" "$IMAGE" -d "$PATCH" | jq -r .caption

SETTINGS=$(jq -n --arg name "$NAME" --arg dataset "$DATASET" --arg model "$MODEL" --argjson steps "$STEPS" --argjson size "$SIZE" '{
  name: $name, dataset_id: $dataset, base_model: $model,
  network: {kind: "lora", rank: 16, alpha: 16},
  unet_lr: 1e-4, text_encoder_lr: 5e-5, scheduler: {id: "cosine"}, lr_warmup_steps: ($steps / 20 | floor),
  max_train_steps: $steps, batch_size: 1, seed: 42,
  resolution: {width_px: $size, height_px: $size},
  buckets: {min_px: ($size / 2), max_px: ($size * 2)}}')
echo "== plan"
json "$BASE/v1/runs:plan" -d "$SETTINGS" | jq -c '{device, images, total_steps, refusal}'
# The key makes it safe to send this again when no answer comes.
RUN=$(json -H "idempotency-key: $DATASET" "$BASE/v1/runs" -d "$SETTINGS" | jq -r .id)
echo "== run $RUN"
call -N "$BASE/v1/runs/$RUN/events" | sed -un 's/^data: //p' |
  jq -rc --unbuffered '[.state, .phase, .step, .loss_average, .eta_s] | map(select(. != null)) | join("  ")'

LORA=$(json "$BASE/v1/runs/$RUN" | jq -r '.lora_id // empty')
if [ -z "$LORA" ]; then
  json "$BASE/v1/runs/$RUN" | jq .error
  exit 1
fi
call -o "$OUTPUT.safetensors" "$BASE/v1/loras/$LORA/content"
# A safetensors file begins with the length of its header, which is JSON.
LENGTH=$(od -An -tu8 -N8 "$OUTPUT.safetensors" | tr -d ' ')
TENSORS=$(head -c $((8 + LENGTH)) "$OUTPUT.safetensors" | tail -c +9 | jq 'keys | map(select(endswith("lora_down.weight"))) | length')
[ "$TENSORS" -gt 0 ]
echo "== $OUTPUT.safetensors: $TENSORS layers"
