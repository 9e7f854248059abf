"""How models are planted: heads whose guilt is known."""
