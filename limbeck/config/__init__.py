"""What a recipe may say: its models, and how YAML becomes them. No torch."""
