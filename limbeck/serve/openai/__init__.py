"""The API that clients of OpenAI's speak."""
