"""What was found out with sapo: evidence, the log of experiments, and the scripts behind them."""
