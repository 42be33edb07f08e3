"""Training data: documents and images, packed and read back."""
