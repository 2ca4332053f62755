"""The server: an OpenAI-compatible API over served models, and the studio's pages."""
