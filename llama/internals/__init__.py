"""What happens inside: captured, changed, explained, and drawn."""
