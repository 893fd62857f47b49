"""What is computed: layers, towers, the two passes, adapters, losses. Arrays in, arrays out."""
