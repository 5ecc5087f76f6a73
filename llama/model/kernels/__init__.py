"""What computes the definitions of `llama.model` fast on a particular machine. Each is optional, and tested against them."""
