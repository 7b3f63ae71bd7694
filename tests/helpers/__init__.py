"""What tests, rank scripts, benchmarks and the GPU check share."""
