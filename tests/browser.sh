#!/bin/sh
# Installs a Chromium for the tests of pages, where there is none: the system's package where we may install one, else
# Playwright's own build, which it downloads from its makers.
set -eu
found() { PYTHONPATH=tests "$BIN/python" -c 'from support import browser; import sys; print(browser.CHROMIUM or ""); sys.exit(not browser.CHROMIUM)'; }
if found; then
    exit 0
fi
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } && found && exit 0
elif command -v apt-get >/dev/null && sudo -n true 2>/dev/null; then
    { sudo apt-get update -qq && sudo apt-get install -qq -y --no-install-recommends chromium; } && found && exit 0
fi
if "$BIN/python" -m playwright install chromium && found; then
    exit 0
fi
echo "no Chromium could be installed; install the system's chromium or google-chrome package, or name one: SAPO_CHROMIUM=/path/to/chrome make test" >&2
exit 1
