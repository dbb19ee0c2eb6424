"""`kong-metering send-test-event`: whether the endpoint takes events, with this token, from here."""
