-- The schema of kong-metering 0.1.0, made by `kong-metering schema --format lua`.
return {
  name = "metering-and-billing",
  fields = {
    {
      protocols = {
        type = "set",
        required = true,
        default = { "grpc", "grpcs", "http", "https" },
        elements = { type = "string", one_of = { "grpc", "grpcs", "http", "https" } },
      },
    },
    {
      config = {
        type = "record",
        required = true,
        fields = {
          {
            ingest_endpoint = {
              type = "string",
              referenceable = true,
              match = "^https?://[^%s/?#]+[^%s]*$",
              err = "expected a URL such as https://us.api.konghq.com/v3/openmeter/events",
              required = true,
              description = "URL that the events are posted to: Konnect Metering & Billing, or an OpenMeter of yours.",
            },
          },
          {
            api_token = {
              type = "string",
              len_min = 1,
              referenceable = true,
              encrypted = true,
              required = true,
              description = "Bearer token for the ingest endpoint.",
            },
          },
          {
            meter_api_requests = { type = "boolean", default = true, description = "Whether each API request gives an event." },
          },
          {
            meter_ai_token_usage = {
              type = "boolean",
              default = true,
              description = "Whether requests to AI models give events with their prompt and completion tokens.",
            },
          },
          {
            subject = {
              type = "record",
              required = true,
              fields = {
                {
                  look_up_value_in = {
                    type = "string",
                    one_of = { "application", "consumer", "header", "query" },
                    default = "consumer",
                    description = "Where the subject, the one who is billed, is found: in a request header or query argument, or as the authenticated consumer or application.",
                  },
                },
                {
                  field = {
                    type = "string",
                    len_min = 1,
                    match_none = {
                      { pattern = "^%s", err = "must not begin with a blank" },
                      { pattern = "%s$", err = "must not end with a blank" },
                      { pattern = "%c", err = "must not contain control characters" },
                    },
                    description = "Name of the header or query argument that holds the subject, or of the field of the consumer or application to use instead of its id, such as username or custom_id.",
                  },
                },
              },
              entity_checks = {
                {
                  conditional = {
                    if_field = "look_up_value_in",
                    if_match = { one_of = { "header", "query" } },
                    then_field = "field",
                    then_match = { required = true },
                  },
                },
                {
                  conditional = {
                    if_field = "look_up_value_in",
                    if_match = { eq = "header" },
                    then_field = "field",
                    then_match = {
                      match_none = {
                        {
                          pattern = "[%s%c:]",
                          err = "a header's name has no blanks, colons or control characters",
                        },
                      },
                    },
                  },
                },
              },
              description = "Who is billed for a request.",
            },
          },
          {
            attributes = {
              type = "array",
              elements = {
                type = "record",
                fields = {
                  {
                    source = {
                      type = "string",
                      one_of = { "header", "query" },
                      required = true,
                      description = "Where in the request the value is found.",
                    },
                  },
                  {
                    look_up_value_in = {
                      type = "string",
                      len_min = 1,
                      match_none = {
                        { pattern = "^%s", err = "must not begin with a blank" },
                        { pattern = "%s$", err = "must not end with a blank" },
                        { pattern = "%c", err = "must not contain control characters" },
                      },
                      required = true,
                      description = "Name of the header or query argument that holds the value.",
                    },
                  },
                  {
                    event_property_name = {
                      type = "string",
                      len_min = 1,
                      match_none = {
                        { pattern = "^%s", err = "must not begin with a blank" },
                        { pattern = "%s$", err = "must not end with a blank" },
                        { pattern = "%c", err = "must not contain control characters" },
                      },
                      required = true,
                      description = "Name of the property in the event's data. The names of the event's own fields are reserved, whether it has them or not: such an attribute is left out.",
                    },
                  },
                },
                entity_checks = {
                  {
                    conditional = {
                      if_field = "source",
                      if_match = { eq = "header" },
                      then_field = "look_up_value_in",
                      then_match = {
                        match_none = {
                          {
                            pattern = "[%s%c:]",
                            err = "a header's name has no blanks, colons or control characters",
                          },
                        },
                      },
                    },
                  },
                },
              },
              description = "Further properties of the events, read from headers and query arguments.",
            },
          },
          {
            allow_status_codes = {
              type = "array",
              elements = {
                type = "string",
                match = "^[0-9][0-9][0-9]%-[0-9][0-9][0-9]$",
                err = "expected a range of status codes such as 200-299, or 404-404 for one",
              },
              description = "Ranges of response status codes, such as 200-299; only requests answered with one of them are metered. Unset or empty: all are.",
            },
          },
          {
            timeout = {
              type = "number",
              default = 10000,
              description = "How long to wait for the endpoint to connect or answer. 0: 60,000, as in Kong. Unit: milliseconds.",
            },
          },
          {
            keepalive = {
              type = "number",
              default = 60000,
              description = "How long an idle connection to the endpoint is kept for reuse. 0: until the endpoint ends it. Unit: milliseconds.",
            },
          },
          {
            ssl_verify = {
              type = "boolean",
              default = true,
              description = "Whether the endpoint's TLS certificate is verified.",
            },
          },
          {
            queue = {
              type = "record",
              required = true,
              fields = {
                {
                  max_batch_size = {
                    type = "integer",
                    between = { 1, 1000000 },
                    default = 1,
                    description = "How many events leave in one request, at most. 1: an event leaves alone, at once; while more come, up to `--adaptive-batch` leave together.",
                  },
                },
                {
                  max_coalescing_delay = {
                    type = "number",
                    between = { 0, 3600 },
                    default = 1,
                    description = "How long the first event of a batch waits for others to fill it. Unit: seconds.",
                  },
                },
                {
                  max_entries = {
                    type = "integer",
                    between = { 1, 1000000 },
                    default = 10000,
                    description = "How many events may wait in memory; beyond it the oldest are dropped. Only with --no-spool, or while the disk takes no writes: with the spool any number waits on disk.",
                  },
                },
                {
                  max_bytes = {
                    type = "integer",
                    description = "How many bytes of events may wait in memory, as max_entries; and how large a batch may be. Unset: no limit. Unit: bytes.",
                  },
                },
                {
                  initial_retry_delay = {
                    type = "number",
                    between = { 0.001, 1000000 },
                    default = 0.01,
                    description = "Pause before what failed is sent again; doubled each time. Unit: seconds.",
                  },
                },
                {
                  max_retry_delay = {
                    type = "number",
                    between = { 0.001, 1000000 },
                    default = 60,
                    description = "The longest pause between two tries. Unit: seconds.",
                  },
                },
                {
                  max_retry_time = {
                    type = "number",
                    default = 60,
                    description = "How long a batch may fail until that counts for the circuit breaker, and until it is dropped with --no-spool (-1: after one try). With the spool it is never given up. Unit: seconds.",
                  },
                },
                {
                  concurrency_limit = {
                    type = "integer",
                    one_of = { -1, 1 },
                    default = 1,
                    description = "1: one batch at a time, in order. -1: each event is sent at once, alone, many at a time.",
                  },
                },
                {
                  failure_threshold = {
                    type = "integer",
                    between = { 0, 1000000 },
                    default = 0,
                    description = "After how many batches in a row that failed for max_retry_time the circuit breaker opens, and nothing is tried; with --no-spool events are dropped meanwhile. 0: never.",
                  },
                },
                {
                  breaker_cooldown = {
                    type = "number",
                    between = { 0, 1000000 },
                    default = 60,
                    description = "How long the open circuit breaker waits before it tries one batch. Unit: seconds.",
                  },
                },
              },
              description = "How events wait, leave in batches, and are tried again.",
            },
          },
        },
      },
    },
  },
}
