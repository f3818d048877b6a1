"""Stage 2: codes → IDs, in passes over parts and buckets; `stage` is the chain of them, the other files its workers."""
