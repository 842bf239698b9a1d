"""Pictures of pictures, for people."""
