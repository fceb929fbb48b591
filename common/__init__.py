"""What every script needs and no model owns. Nothing in here imports a script."""
