"""How far a reconstruction is from an image."""
