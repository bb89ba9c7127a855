"""Tools that engines, layers and mechanisms share: rows and padding, visibility, random draws, angles, precision, files."""
