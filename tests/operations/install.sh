#!/bin/sh
# What tests/operations needs of the system: PostgreSQL and a Chromium. Installed where we may (root, Debian); elsewhere said
# loudly, and the tests that need them are skipped.
missing=
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing=postgresql
for name in chromium chromium-browser google-chrome; do command -v $name >/dev/null && browser=$name; done
[ -n "$browser" ] || missing="$missing chromium"
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "installing $missing"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null && exit 0
fi
echo "NOT TESTED HERE: what needs $missing (Debian: apt-get install $missing). Without PostgreSQL the rest runs on SQLite." >&2
