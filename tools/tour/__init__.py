"""Five experiments on the demo model: see README.md."""
