"""The five laws under fire: python -m stress --help."""
