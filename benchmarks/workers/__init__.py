"""What benchmarks run in processes of their own, and what they share."""
