"""Pure functions from arrays to frozen results; numpy and scipy only."""
