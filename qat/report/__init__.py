"""Reports: pages of tables and figures about finished runs."""
