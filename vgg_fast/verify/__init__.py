"""Checking every op on every kernel of a machine: what ``vgg-fast verify`` runs and reports."""
