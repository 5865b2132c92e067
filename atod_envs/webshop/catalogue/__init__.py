"""A catalogue of products: the official files, and the memory-mapped store that is built from them."""
