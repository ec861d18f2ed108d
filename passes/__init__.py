"""The passes, one module each, grouped by what they are for. Found by walking this package."""
