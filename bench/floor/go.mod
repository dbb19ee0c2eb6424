module kong-metering/bench/floor

go 1.21
