"""inspect: reads runs, changes nothing."""
