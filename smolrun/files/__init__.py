"""Model files: name -> path -> metadata and tensor views. Nothing of models."""
