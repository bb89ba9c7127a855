"""Mathematics that several mechanisms share. Engines check and describe; backends compute."""
