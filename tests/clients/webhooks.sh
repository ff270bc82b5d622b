#!/usr/bin/env bash
# Webhooks as a receiver in another language hears them; see webhooks.py.
source "$(dirname "$0")/tools.sh"

python_tools
make_pictures
key=$(make_key hooks admin)
start_service hooks LORASMITH_WEBHOOK_ALLOWED_NETWORKS='["127.0.0.0/8"]' LORASMITH_WEBHOOK_RETRY_S=0.2
LORASMITH=$BASE LORASMITH_API_KEY=$key step Webhooks python3 "$HERE/webhooks.py" "$PICTURES" diffusers
