"""The program `kong-metering`: what people and scripts ask and do by hand, beside the running servers."""
