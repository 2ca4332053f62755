"""The server: an OpenAI-compatible API over the served models, and the pages of the studio."""
