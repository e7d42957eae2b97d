"""What tests, benchmarks and users' own checks share: sample problems, comparison, timing."""
