"""How shards are written and read, by the format of their files."""
