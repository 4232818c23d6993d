"""The guest test harness: see integration/README.md."""
