"""`kong-metering check`: what is wrong, and what is surely not meant, in a configuration before Kong has it.

From a file to what is told: `documents` (text), `entities` (whose plugin is where), `settings` with `violations` (what
Kong and the plugin refuse), `meaning` and `scopes` (what is valid and not meant); `kongconf`, and `pluginname` (how the
plugin is called by it).
"""
