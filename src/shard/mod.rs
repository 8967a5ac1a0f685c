//! What a storage lcore runs: drain rings, build batches, append, acknowledge.
