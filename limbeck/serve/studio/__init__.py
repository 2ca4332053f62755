"""The studio's pages: chat, arena, review and runs."""
