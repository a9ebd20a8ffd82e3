"""Texts -> vectors. Knows no corpus and no Ray. `spec` names a model on the driver, `embedder` is one in a worker."""
