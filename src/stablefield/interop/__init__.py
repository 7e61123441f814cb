"""Other people's files and frameworks."""
