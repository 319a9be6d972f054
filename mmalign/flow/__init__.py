"""Flow sampling: transition kernels, plans, and the one loop that trajectories them."""
