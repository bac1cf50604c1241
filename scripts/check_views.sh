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
npx vite build --outDir "$built" --logLevel error
npx vite build --mode workbench --outDir "$built" --logLevel error
packed=0
for name in views workbench; do
  cmp "$built/$name.js" "../src/pellucid/views/static/$name.js" || { echo "views: static/$name.js is not what web/ builds: run npm run build in web/"; exit 1; }
  packed=$((packed + $(gzip -9c "../src/pellucid/views/static/$name.js" | wc -c)))
done
echo "views: the bundles are what their source gives, $packed bytes packed"
test "$packed" -le 256000
