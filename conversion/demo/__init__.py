"""The demonstration behind `armt demo`, and the small backbone it uses."""
