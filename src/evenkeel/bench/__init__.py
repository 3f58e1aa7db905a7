"""Benchmarks: our ops and training steps against torch's, on one clock and one allocator."""
