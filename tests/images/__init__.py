"""Real container images for tests, demo and benches, made from packages and by other programs, then kept.

Each image is a directory in the cache with an OCI layout `oci` (tag `latest`); `python -m tests.images NAME` makes
it where it is missing and prints the directory.

debian       Debian bookworm minbase, + python3, numpy, requests, + build-essential: three layers made by umoci, gzip
debian-plain the same image with uncompressed layers
debian-old   its predecessor, from the packages of the point release: what a security update changes lies between them
small        50,000 small files in one layer
adversarial  everything that a tar layer may hold, in layers written by tarfile, GNU tar and bsdtar
layers127    127 small layers
"""
