"""The control socket: its server, its commands, and the services behind them."""
