"""How good rewards are against preferences: figures, pictures, the report."""
