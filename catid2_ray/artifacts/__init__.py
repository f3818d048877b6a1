"""What may lie on object storage, and how it gets there: schemas, manifests, the store, releases."""
