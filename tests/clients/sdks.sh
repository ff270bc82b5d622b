#!/usr/bin/env bash
# Generates clients from the documents that a service serves, and trains a LoRA with each of them and with curl.
#
#   usage: sdks.sh [BASE_URL [PICTURES.zip BASE_MODEL [STEPS RESOLUTION]]]
#
# Without an address it starts a service with a tiny model of its own.
source "$(dirname "$0")/tools.sh"

python_tools
if [ $# -gt 0 ]; then
  BASE=$1
else
  key=$(make_key sdks write)
  start_service sdks
  export LORASMITH_API_KEY=$key
fi
export LORASMITH=$BASE
PICTURES=${2:-} MODEL=${3:-diffusers} STEPS=${4:-4} SIZE=${5:-128}
[ -n "$PICTURES" ] || make_pictures

# Each tool reads what is served, not what is checked in.
curl -sSf "$BASE/openapi.json" >"$WORK/openapi.json"
curl -sSf "$BASE/openapi-3.0.json" >"$WORK/openapi-3.0.json"

with_curl() {
  "$ROOT/examples/quickstart.sh" "$PICTURES" "$MODEL" "$WORK/curl" "$STEPS" "$SIZE"
}

with_python() {
  openapi-generator-cli generate -i "$WORK/openapi.json" -g python -o "$WORK/python" --package-name lorasmith_client \
    --global-property apiTests=false,modelTests=false,apiDocs=false,modelDocs=false 2>&1 | { grep -E "WARN|ERROR" || true; } >"$WORK/python.log"
  PYTHONPATH=$WORK/python python3 "$ROOT/examples/python/train.py" "$PICTURES" "$MODEL" --steps "$STEPS" \
    --resolution "$SIZE" --output "$WORK/python.safetensors"
}

with_typescript() {
  local folder=$CLIENTS_CACHE/typescript
  mkdir -p "$folder"
  if ! cmp -s "$ROOT/examples/typescript/package-lock.json" "$folder/package-lock.json"; then
    cp "$ROOT"/examples/typescript/*.json "$folder"
    (cd "$folder" && npm ci --silent --no-fund --no-audit)
  fi
  mkdir "$WORK/typescript"
  cp "$ROOT"/examples/typescript/*.{ts,json} "$WORK/typescript"
  ln -s "$folder/node_modules" "$WORK/typescript/node_modules"
  (
    cd "$WORK/typescript"
    npm run --silent generate >"$WORK/typescript.log" 2>&1
    npm run --silent types >>"$WORK/typescript.log" 2>&1
    npm run --silent build
    node dist/train.js "$PICTURES" "$MODEL" "$STEPS" "$SIZE" "$WORK/typescript.safetensors"
    node dist/fetch.js "$PICTURES" "$MODEL" "$STEPS" "$SIZE" "$WORK/fetch.safetensors"
  )
}

with_rust() {
  # Not the workspace's lints: most of the code is generated.
  env -u RUSTC_WORKSPACE_WRAPPER -u CLIPPY_ARGS LORASMITH_OPENAPI="$WORK/openapi-3.0.json" \
    CARGO_TARGET_DIR="$CARGO_TARGET_DIR/clients" cargo run -q --locked \
    --manifest-path "$ROOT/examples/rust/Cargo.toml" -- "$PICTURES" "$MODEL" "$STEPS" "$SIZE" "$WORK/rust.safetensors"
}

step curl with_curl
step "Python (openapi-generator)" with_python
step "TypeScript (openapi-generator, openapi-typescript)" with_typescript
step "Rust (progenitor)" with_rust

# Same pictures, same settings, same seed: clients that send the same run get the same file.
for file in "$WORK"/{curl,python,typescript,fetch,rust}.safetensors; do test -s "$file"; done
echo "clients: all of them have trained a LoRA"
