"""How a run samples: the kernels and plans that a config can name."""
