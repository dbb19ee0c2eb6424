"""Why a request gives no event, and why an event is not delivered: what is counted apart. Pure."""

from __future__ import annotations

from enum import Enum


class Skipped(str, Enum):
    """Why a request gave no event."""

    NO_SUBJECT = "no_subject"
    STATUS_NOT_ALLOWED = "status_not_allowed"
    UNUSABLE_CONFIGURATION = "unusable_configuration"
    ERROR = "error"


class Dropped(str, Enum):
    """Why an accepted event will never be delivered."""

    QUEUE_FULL = "queue_full"
    QUEUE_BYTES_FULL = "queue_bytes_full"
    EVENT_TOO_LARGE = "event_too_large"
    RETRY_TIME_EXCEEDED = "retry_time_exceeded"
    BREAKER_OPEN = "breaker_open"
    REJECTED = "rejected"
    PROCESS_ENDED = "process_ended"
    SPOOL_BYTES_FULL = "spool_bytes_full"
    SPOOL_AGE_EXCEEDED = "spool_age_exceeded"


class Buried(str, Enum):
    """Why an accepted event is a dead letter: kept on disk, and not delivered by itself."""

    # The endpoint refused it for itself.
    REJECTED = "rejected"
    # It was sent longer ago than the endpoint can tell events that come twice, and nobody knows whether it arrived.
    AMBIGUOUS = "ambiguous"
    # It is larger than the endpoint's own storage takes.
    TOO_LARGE = "too_large"
    # Damage to the disk's files: the bytes are set aside.
    UNREADABLE = "unreadable"
