"""Direct Multi-Turn Preference Optimization (arXiv 2406.14868), end to end: one module a stage."""
