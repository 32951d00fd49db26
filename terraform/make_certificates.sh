#!/usr/bin/env bash
# Make the certificates with which the VMs of a cluster recognise each other (mutual TLS): ca.pem is the certificate of
# a new authority, vm.pem one that it signed, and its key. All VMs use the same one, because Dask does not compare host
# names. The authority's key is not kept, so it can sign nothing else.
# Usage: make_certificates.sh <folder>
set -euo pipefail
umask 077

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Python 3.13 refuses certificates without these extensions.
cat > "$scratch/openssl.cnf" << 'END'
[req]
distinguished_name = none
[none]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[vm]
basicConstraints = critical, CA:FALSE
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END

for name in ca vm; do openssl ecparam -name prime256v1 -genkey -noout -out "$scratch/$name.key"; done
openssl req -new -x509 -config "$scratch/openssl.cnf" -extensions authority -subj "/CN=necstlab cluster authority" \
  -key "$scratch/ca.key" -sha256 -days 3650 -out "$scratch/ca.pem"
openssl req -new -config "$scratch/openssl.cnf" -subj "/CN=necstlab cluster VM" \
  -key "$scratch/vm.key" -out "$scratch/vm.csr"
openssl x509 -req -in "$scratch/vm.csr" -extfile "$scratch/openssl.cnf" -extensions vm \
  -CA "$scratch/ca.pem" -CAkey "$scratch/ca.key" -set_serial 2 -sha256 -days 3650 -out "$scratch/vm.crt"

mkdir -p "$1"
cp "$scratch/ca.pem" "$1/ca.pem"
cat "$scratch/vm.crt" "$scratch/vm.key" > "$1/vm.pem"
