"""Our numbers against recorded reference numbers. The data and its origin: data/README.md."""
