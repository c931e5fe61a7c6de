#!/usr/bin/env bash
# Installs Chromium, in which the pages of `genssd report` are tested (tests/distill/report/test_browser.py), where that
# is possible: as root, with apt-get. Elsewhere it says why it does not; the tests are skipped then. It never fails, and
# ends after a few minutes at most.
# GENSSD_NO_BROWSER=1: install none
set -uo pipefail
minutes=4

find_browser() { # the names of tests/support/browser.py
  command -v chromium || command -v chromium-browser || command -v google-chrome || command -v chrome
}

skip() {
  echo "browser tests will be skipped: $1"
  exit 0
}

if browser=$(find_browser); then
  echo "browser tests run in $browser"
  exit 0
fi
[[ -z ${GENSSD_NO_BROWSER:-} ]] || skip "no Chromium, and GENSSD_NO_BROWSER is set"
command -v apt-get > /dev/null || skip "no Chromium, and no apt-get to install it with"
[[ $(id -u) == 0 ]] || skip "no Chromium, and only root can install it: sudo apt-get install chromium"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! timeout "${minutes}m" bash -c \
  'apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium fonts-dejavu-core' > "$log" 2>&1; then
  skip "no Chromium, and apt-get did not install it within $minutes minutes: $(grep -v '^$' "$log" | tail -1)"
fi
browser=$(find_browser) || skip "apt-get's package chromium brings no browser of that name"
echo "browser tests run in $browser, which was installed"
