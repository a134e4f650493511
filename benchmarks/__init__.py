"""What things cost, measured as ratios in one run on one machine."""
