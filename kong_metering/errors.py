"""The exceptions that cross module borders."""


class KongMeteringError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(KongMeteringError):
    """A plugin configuration that cannot be used; the text names each setting, what is wrong, and never a secret."""


class StartupError(KongMeteringError):
    """The plugin server cannot start; the text says what was found and what to do."""


class SpoolError(KongMeteringError):
    """The spool's directory cannot be used; the text gives the system's own words and what to do."""


class SpoolFormatError(SpoolError):
    """A file of the spool was written in a format that this version does not know; it is left as it is."""


class InboxError(KongMeteringError):
    """Events cannot be kept in shared memory; the text gives the place and the system's own words."""


# What the spool raises for the disk's sake.
DISK_ERRORS = (OSError, SpoolError)
