"""Learning: the surrogate losses and the update that minimises them."""
