#!/bin/sh
# From pictures to a LoRA with curl and jq, against a running service.
#
#   usage: quickstart.sh PICTURES.zip BASE_MODEL [NAME]
#
# PICTURES.zip is in kohya layout: 10_lumo/*.png with *.txt captions, and perhaps 10_lumo_reg/. BASE_MODEL is a name or
# id of `GET /v1/models`. The address comes from LORASMITH, http://127.0.0.1:7870 when unset.
set -eu
BASE=${LORASMITH:-http://127.0.0.1:7870}
PICTURES=$1 MODEL=$2 NAME=${3:-my-lora}

json() { curl -sS --fail-with-body -H 'content-type: application/json' "$@"; }

echo "== models"
json "$BASE/v1/models" | jq -r '.data[] | "\(.name)  \(.family)  \(if .trainable then "" else .problem end)"'

DATASET=$(json "$BASE/v1/datasets" -d "$(jq -n --arg name "$NAME" '{name: $name}')" | jq -r .id)
echo "== upload to dataset $DATASET"
curl -sS --fail-with-body "$BASE/v1/datasets/$DATASET/images" -F "file=@$PICTURES" |
  jq '.summary, (.files[] | select(.outcome == "refused"))'

RUN=$(json "$BASE/v1/runs" -d "$(jq -n --arg name "$NAME" --arg dataset "$DATASET" --arg model "$MODEL" '{
  name: $name, dataset_id: $dataset, base_model: $model,
  network: {kind: "lora", rank: 16, alpha: 16},
  unet_lr: 1e-4, text_encoder_lr: 5e-5, scheduler: {id: "cosine"}, lr_warmup_steps: 50,
  max_train_steps: 1000, batch_size: 1, seed: 42,
  resolution: {width_px: 512, height_px: 512}}')" | jq -r .id)
echo "== run $RUN"
curl -sSN "$BASE/v1/runs/$RUN/events" | sed -n 's/^data: //p' | jq -rc '[.state, .phase, .step, .loss_average, .eta_s] | map(select(. != null)) | join("  ")'

LORA=$(json "$BASE/v1/runs/$RUN" | jq -r '.lora_id // empty')
if [ -z "$LORA" ]; then
  json "$BASE/v1/runs/$RUN" | jq .error
  exit 1
fi
curl -sS --fail-with-body -o "$NAME.safetensors" "$BASE/v1/loras/$LORA/content"
echo "== $NAME.safetensors"
