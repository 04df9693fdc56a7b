"""Vision towers and the adaptor behind them."""
