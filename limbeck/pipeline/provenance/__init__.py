"""Where a model comes from: licences, lineage, and what a release says of it."""
