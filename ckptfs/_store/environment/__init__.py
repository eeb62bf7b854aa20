"""Settings of a store that the caller's environment holds: variables, profiles, proxies."""
