"""Pages of tables and figures about finished runs."""
