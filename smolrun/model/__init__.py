"""Arrays: weights as panels, the KV cache, and the model that fills the kernels' argument block."""
