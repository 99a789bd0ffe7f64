"""What benchmarks train in one plain process: a log in memory, and click models on it."""
