"""Who scores sampled tokens besides the student: a model here, on an engine, or behind a server."""
