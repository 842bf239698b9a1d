"""What comes from outside and is not trusted, and the ground that all stands on."""
