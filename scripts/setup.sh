#!/usr/bin/env bash
# Installs what the tests need from Debian's packages, as root. It does nothing
# where everything is there already.
set -euo pipefail
missing=()
need() { command -v "$1" >/dev/null 2>&1 || missing+=("$2"); }
need git git
need make make
need gcc gcc
# What test/chaos breaks clusters with.
need strace strace
need ip iproute2
need nsenter util-linux
# What runs virtual machines: QEMU, and a small kernel with its modules.
need qemu-system-x86_64 qemu-system-x86
[ "$(uname -m)" != x86_64 ] || ls /boot/vmlinuz-*cloud-amd64 >/dev/null 2>&1 || missing+=(linux-image-cloud-amd64)
# The real servers behind drivers, and what the provider example in Python runs on.
need redis-server redis-server
need nats-server nats-server
/usr/bin/python3 -c 'import grpc' 2>/dev/null || missing+=(python3-grpcio)
/usr/bin/python3 -c 'import grpc_tools' 2>/dev/null || missing+=(python3-grpc-tools)
[ -e /usr/include/stdlib.h ] || missing+=(libc6-dev)
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
  echo "missing: ${missing[*]}; install them (on Debian as root: apt-get install --no-install-recommends ${missing[*]})" >&2
  exit 1
fi
echo "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
