"""Two models of one descent: what does one say with the other's activations or weights?"""
