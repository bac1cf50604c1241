#!/usr/bin/env bash
# The built site in a browser, from disk: no request to anywhere, no missing file, readable for everybody, searchable.
set -euo pipefail
cd "$(dirname "$0")/../web"
lacks() { echo "site: not checked, $1"; exit "${PELLUCID_CI:-0}"; }
command -v node > /dev/null || lacks "Node is not installed"
[ -x "${CHROMIUM:-/usr/bin/chromium}" ] || lacks "Chromium is not installed"
[ -d node_modules/playwright-core ] || npm ci --loglevel=error || lacks "the packages of web/ could not be installed"
node e2e/site.mjs ../docs/_build/site
