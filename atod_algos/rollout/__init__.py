"""Playing episodes: one turn loop, and the pools that run it here, on several ranks or on Ray."""
