"""Files to units to shards: storage, plan, reader, writer, ledger. Knows no torch and no Ray."""
