"""The first minutes on a card: ``python -m benchmarks.first_light --out DIR``, and what RESULTS.md tells of them."""
