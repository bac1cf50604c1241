#!/usr/bin/env bash
# Are the committed views what their source gives? Fresh packages, types, tests, a build compared byte by byte.
set -euo pipefail
cd "$(dirname "$0")/../web"
command -v node >/dev/null || { echo "views: not checked, Node is not installed"; exit "${PELLUCID_CI:-0}"; }
npm ci --loglevel=error || { echo "views: not checked, the packages of web/ could not be installed"; exit "${PELLUCID_CI:-0}"; }
npm run --silent check
npm run --silent test
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
npm run --silent build -- --outDir "$built" --logLevel error
cmp "$built/views.js" ../src/pellucid/views/static/views.js || { echo "views: static/views.js is not what web/ builds: run npm run build in web/"; exit 1; }
size=$(gzip -9c ../src/pellucid/views/static/views.js | wc -c)
echo "views: the bundle is what its source gives, $size bytes packed"
test "$size" -le 256000
