"""How the embedded models are trained: recipes, stages, material and courses."""
