#!/usr/bin/env bash
# Every check with clients that nobody here wrote, against the program that is built. Tools are kept in ~/.cache.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

"$here/sdks.sh"
"$here/webhooks.sh"
"$here/schemathesis.sh"
