"""Load the plugin of this repository also where the package is not installed; no logic here."""

pytest_plugins = ["parity.plugin"]
