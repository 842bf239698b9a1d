"""How a run is judged while it learns: held-out pictures, pictures that fit worst, sizes."""
