-- A control plane runs no plugin: it has to know when it would run, and of which version the configuration is.
return { PRIORITY = 850, VERSION = "0.1.0" }
