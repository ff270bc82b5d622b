#!/usr/bin/env bash
# Fuzzes every operation of a service, with a key and without: no 500, no answer that the document does not name, no
# body that its schema does not allow; by single requests and in chains from what one answer holds to what it names.
#
#   usage: schemathesis.sh [EXAMPLES [SEED]]
#
# EXAMPLES is how many requests are made up for each operation, 5 when not given.
source "$(dirname "$0")/tools.sh"

EXAMPLES=${1:-5} SEED=${2:-1}
python_tools

fuzz() {
  local name=$1 key=$2 headers=()
  [ -z "$key" ] || headers=(--header "Authorization: Bearer $key")
  start_service "$name" LORASMITH_WEBHOOK_ALLOWED_NETWORKS='["127.0.0.0/8"]'
  # Something to find: pictures, a run that has ended, its events, samples and files.
  LORASMITH=$BASE LORASMITH_API_KEY=$key "$ROOT/examples/quickstart.sh" "$PICTURES" diffusers "$WORK/lora" 2 128 >"$WORK/quickstart.log"
  (
    cd "$WORK" # where the fuzzer leaves what it remembers
    schemathesis --config-file "$HERE/schemathesis.toml" run "$BASE/openapi.json" --no-color --seed "$SEED" \
      --max-examples "$EXAMPLES" "${headers[@]}"
  ) >"$WORK/$name-report.log" || { cat "$WORK/$name-report.log"; return 1; }
  sed -n '/Test Phases/,/Seed/p' "$WORK/$name-report.log"
  ! grep -i '"level":"ERROR"\|panicked' "$WORK/$name.log" | grep -v 'stream error: request parse error'
}

make_pictures
step "Schemathesis without a key" fuzz open ""
step "Schemathesis with a key" fuzz keyed "$(make_key keyed admin)"
