"""Provenance of models: licences, lineage, model cards and releases."""
