"""Process groups, collectives and start-up. Imports nothing of the project but config."""
