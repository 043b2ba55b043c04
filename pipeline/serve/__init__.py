"""A page on the loopback that shows runs, graphs, reports and datasets; it looks, and does nothing else."""
