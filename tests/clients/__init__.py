"""Unmodified clients through the proxy of a three-node cluster: docs/clients.md is the outcome (issue 4)."""
