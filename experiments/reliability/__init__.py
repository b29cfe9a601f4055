"""Is anything lost, or anything wrong loaded? Kills, faults, damaged files and strange words."""
