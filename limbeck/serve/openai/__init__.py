"""The OpenAI-compatible API: request schemas and routes."""
